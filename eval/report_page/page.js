// Small helpers, the theme, and reading values off the curves.

const find = (selector, inside = document) => inside.querySelector(selector);
const all = (selector, inside = document) => [...inside.querySelectorAll(selector)];

/** An element with properties, attributes (aria-*, data-*, role ...) and children, which may be text. */
function make(name, properties = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (value === null || value === undefined) continue;
    if (key in element && !key.includes("-")) element[key] = value;
    else element.setAttribute(key, value);
  }
  element.append(...children.filter(child => child !== null));
  return element;
}

/** What the browser remembers for us; nothing where it may not. */
const memory = {
  read(key) {
    try { return localStorage.getItem(key); } catch { return null; }
  },
  write(key, value) {
    try { localStorage.setItem(key, value); } catch { /* a private window, or storage that is full */ }
  },
};

const json = id => JSON.parse(find(`#${id}`).textContent);

// --- theme ---

const THEMES = ["auto", "light", "dark"];

function applyTheme(theme) {
  document.documentElement.style.colorScheme = theme === "auto" ? "light dark" : theme;
  const button = find("#theme");
  button.textContent = `Theme: ${theme}`;
  button.dataset.theme = theme;
}

find("#theme").hidden = false;
find("#theme").addEventListener("click", event => {
  const next = THEMES[(THEMES.indexOf(event.currentTarget.dataset.theme) + 1) % THEMES.length];
  memory.write("diffalign theme", next);
  applyTheme(next);
});
applyTheme(THEMES.includes(memory.read("diffalign theme")) ? memory.read("diffalign theme") : "auto");

// --- curves: a pointer, or the arrow keys, read the values at a step ---

function readCurves(figure, chart) {
  const canvas = find(".canvas", figure), cursor = find(".cursor", figure), outputs = all("output", figure);
  const steps = [...new Set(chart.curves.flatMap(curve => curve.map(point => point[0])))].sort((a, b) => a - b);
  let place = -1;

  function show(index) {
    place = Math.max(0, Math.min(steps.length - 1, index));
    const step = steps[place], span = chart.to - chart.from;
    const share = chart.left + (chart.right - chart.left) * (span ? (step - chart.from) / span : 0.5);
    cursor.hidden = false;
    cursor.style.left = `${100 * share}%`;
    cursor.dataset.step = step;
    chart.curves.forEach((curve, i) => {
      const near = curve.reduce((a, b) => (Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a));
      outputs[i].textContent = near[1].toPrecision(4).replace(/\.?0+(e|$)/, "$1");
    });
  }
  function hide() {
    cursor.hidden = true;
    outputs.forEach(output => { output.textContent = ""; });
  }
  canvas.addEventListener("pointermove", event => {
    const box = canvas.getBoundingClientRect();
    const share = ((event.clientX - box.left) / box.width - chart.left) / (chart.right - chart.left);
    const step = chart.from + share * (chart.to - chart.from);
    show(steps.reduce((best, one, i) => (Math.abs(one - step) < Math.abs(steps[best] - step) ? i : best), 0));
  });
  canvas.addEventListener("pointerleave", hide);
  canvas.addEventListener("blur", hide);
  canvas.addEventListener("keydown", event => {
    const stride = event.shiftKey ? 10 : 1;
    const moves = { ArrowLeft: place - stride, ArrowRight: place + stride, Home: 0, End: steps.length - 1 };
    if (!(event.key in moves)) return;
    event.preventDefault();
    show(moves[event.key]);
  });
}

{
  const charts = json("chart-data");
  all(".plot").forEach((figure, i) => readCurves(figure, charts[i]));
}

// The list: filters decide what is in it, and only what is near the viewport has elements.

const list = find("#list"), filters = find("#filters");
const SPARE_ROWS = 2;
let shown = [];
let active = 0;
let columns = 1, rowHeight = 1, gap = 16;
const cards = new Map(); // position -> element

/** Score of one side minus that of another; null where either is missing. */
function margin(item, over, under, scorer) {
  const score = side => item.cells.find(cell => cell.side === side)?.scores?.[scorer] ?? null;
  const [a, b] = [score(over), score(under)];
  return a === null || b === null ? null : a - b;
}

function readFilters() {
  const form = new FormData(filters);
  const choice = name => (form.get(name) ? Number(form.get(name)) : null);
  const rights = gallery.sides.map((_, side) => form.get(`right${side}`) || null);
  return {
    words: (form.get("text") ?? "").toLowerCase().split(/\s+/).filter(Boolean),
    set: choice("set"), task: choice("task"), rights,
    over: choice("over"), under: choice("under"), scorer: choice("scorer"), low: choice("low"), high: choice("high"),
    order: form.get("order"), voted: form.get("voted"),
  };
}

function matches(item, f) {
  if (f.set !== null && item.set !== f.set) return false;
  if (f.task !== null && item.task !== f.task) return false;
  if (f.voted && votes.has(item.id) !== (f.voted === "yes")) return false;
  for (const [side, wanted] of f.rights.entries()) {
    if (wanted === null) continue;
    const cell = item.cells.find(one => one.side === side);
    if (!cell || !("right" in cell) || String(cell.right) !== wanted) return false;
  }
  if (f.low !== null || f.high !== null) {
    const value = margin(item, f.over, f.under, f.scorer);
    if (value === null || (f.low !== null && value < f.low) || (f.high !== null && value > f.high)) return false;
  }
  if (f.words.length) {
    item.text ??= [item.prompt, ...item.cells.map(cell => cell.reason ?? "")].join("\n").toLowerCase();
    if (!f.words.every(word => item.text.includes(word))) return false;
  }
  return true;
}

function order(items, f) {
  if (f.order === "random") return items.sort((a, b) => (a.id < b.id ? -1 : 1)); // ids are digests
  if (f.order !== "gain" && f.order !== "loss") return items;
  const sign = f.order === "gain" ? -1 : 1;
  const value = item => margin(item, f.over, f.under, f.scorer);
  return items.map(item => [item, value(item)])
    .sort(([, a], [, b]) => (a === null) - (b === null) || sign * ((a ?? 0) - (b ?? 0)))
    .map(([item]) => item);
}

function applyFilters() {
  const f = readFilters();
  const kept = shown[active];
  shown = order(gallery.items.filter(item => matches(item, f)), f);
  active = Math.max(0, shown.indexOf(kept));
  const total = gallery.items.length;
  find("#count").textContent = shown.length === total ? `${total} samples` : `${shown.length} of ${total} samples`;
  find("#none").hidden = shown.length > 0;
  redraw();
}

/** Everything anew: after another filter, another size, or another way to show a sample. */
function redraw() {
  const focused = list.contains(document.activeElement);
  list.replaceChildren();
  cards.clear();
  list.style.cssText = "";
  if (!shown.length) return;
  const sides = Math.max(...gallery.items.map(item => item.cells.length));
  const width = list.clientWidth, least = Math.min(width, Math.max(sides * 168, 260) + 26);
  columns = Math.max(1, Math.floor((width + gap) / (least + gap)));
  list.style.setProperty("--columns", columns);
  list.style.setProperty("--sides", Math.min(sides, Math.max(1, Math.floor((width - 26) / 132))));
  list.style.setProperty("--ratio", gallery.ratio);
  const letters = Math.max(...gallery.items.map(item => item.prompt.length));
  list.style.setProperty("--lines", letters * 8 < width / columns - 40 ? 1 : 2);
  const probe = shown.slice(0, columns).map((item, i) => list.appendChild(drawCard(item, i, shown.length)));
  rowHeight = Math.ceil(Math.max(...probe.map(card => card.getBoundingClientRect().height)));
  list.replaceChildren();
  list.style.gridAutoRows = `${rowHeight}px`;
  list.style.height = `${Math.ceil(shown.length / columns) * (rowHeight + gap) - gap}px`;
  drawNear();
  if (focused) focusCard(active, false);
}

/** Makes the cards near the viewport and lets the others go. */
function drawNear() {
  if (!shown.length) return;
  const box = list.getBoundingClientRect(), stride = rowHeight + gap;
  const rows = Math.ceil(shown.length / columns);
  const first = Math.max(0, Math.min(rows - 1, Math.floor(-box.top / stride)) - SPARE_ROWS);
  const last = Math.min(rows - 1, Math.max(0, Math.floor((innerHeight - box.top) / stride)) + SPARE_ROWS);
  const from = first * columns, to = Math.min(shown.length, (last + 1) * columns);
  list.style.paddingTop = `${first * stride}px`;
  for (const [position, card] of cards) {
    if (position >= from && position < to) continue;
    if (card.contains(document.activeElement)) list.focus({ preventScroll: true });
    card.remove();
    cards.delete(position);
  }
  let before = null;
  for (let position = to - 1; position >= from; position--) {
    let card = cards.get(position);
    if (!card) {
      card = drawCard(shown[position], position, shown.length);
      markVotes(card, shown[position]);
      cards.set(position, card);
      list.insertBefore(card, before);
    }
    before = card;
  }
  setTabStop();
}

/** One card of the list can be reached with the tab key, its buttons behind it. */
function setTabStop() {
  const stop = cards.has(active) ? active : Math.min(...cards.keys());
  for (const [position, card] of cards) {
    card.tabIndex = position === stop ? 0 : -1;
    all("button", card).forEach(button => { button.tabIndex = card.tabIndex; });
  }
}

/** Moves to a sample, scrolls to it where it is out of sight, and focuses it unless another element holds the focus. */
function focusCard(position, scroll = true) {
  active = Math.max(0, Math.min(shown.length - 1, position));
  if (scroll) {
    const top = list.getBoundingClientRect().top + Math.floor(active / columns) * (rowHeight + gap);
    const head = find("header.bar").getBoundingClientRect().height + 8;
    const below = Math.min(top - head, top + rowHeight - innerHeight + 8);
    if (top < head || below > 0) scrollBy({ top: top < head ? top - head : below, behavior: "instant" });
  }
  drawNear();
  cards.get(active)?.focus({ preventScroll: true });
}

/** A sample whose vote has changed. */
function refresh(item) {
  const card = cards.get(shown.indexOf(item));
  if (card) {
    markVotes(card, item);
    card.setAttribute("aria-label", describe(item));
  }
  if (detail.open && detailItem === item) markVotes(detail, item);
}

function voteAndGoOn(digit) {
  const item = shown[active], choice = choiceOf(item, digit);
  if (choice === undefined || item.cells.length < 2) return;
  vote(item, choice);
  refresh(item);
  if (active < shown.length - 1) go(active + 1);
}

/** Shows the sample at a position: in the list, or enlarged where that is open. */
function go(position) {
  if (detail.open) {
    active = Math.max(0, Math.min(shown.length - 1, position));
    showDetail();
  } else focusCard(position);
}

function playClips(element) {
  const clips = all("video", element);
  const playing = clips.some(clip => !clip.paused);
  for (const clip of clips) {
    if (playing) clip.pause();
    else {
      clip.currentTime = 0;
      clip.play();
    }
  }
}

function toggle(name) {
  settings[name] = !settings[name];
  const button = find(`#${name}`);
  button.setAttribute("aria-pressed", String(settings[name]));
  find("#app").classList.toggle("no-boxes", !settings.boxes);
  find("#detail").classList.toggle("no-boxes", !settings.boxes);
  if (name === "blind") {
    redraw();
    if (detail.open) showDetail();
  }
}

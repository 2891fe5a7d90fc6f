// What one sample looks like: pictures, boxes, verdicts, scores.

const gallery = json("gallery-data");
const settings = { boxes: true, blind: false };
const hasBoxes = gallery.items.some(item => item.cells.some(cell => cell.boxes || cell.path));
const hasReasons = gallery.items.some(item => item.cells.some(cell => cell.reason));
const hasVerdicts = gallery.items.some(item => item.cells.some(cell => "right" in cell));
const hasScores = gallery.items.some(item => item.cells.some(cell => cell.scores));
const SVG = "http://www.w3.org/2000/svg";

const shortNumber = value => (value === null || value === undefined ? "-" : String(Number(value.toPrecision(4))));
const signed = value => (value > 0 ? "+" : "") + String(Number(value.toPrecision(3)));

/** The cells of an item as they are shown: shuffled, the same way every time, while names are hidden. */
function shownCells(item) {
  const cells = [...item.cells];
  if (!settings.blind) return cells;
  const order = cell => parseInt(item.id.slice(0, 8), 16) * 2654435761 * (cell.side + 1) % 4294967291;
  return cells.sort((a, b) => order(a) - order(b));
}

function nameOf(item, cell) {
  if (!settings.blind) return gallery.sides[cell.side];
  return `picture ${shownCells(item).indexOf(cell) + 1}`;
}

/** Boxes, or the path of an object, over a picture: in shares of its sides, so that they fit at any size. */
function drawBoxes(cell, labels) {
  const layer = make("div", { className: "boxes", "aria-hidden": "true" });
  const svg = layer.appendChild(document.createElementNS(SVG, "svg"));
  svg.setAttribute("viewBox", "0 0 1 1");
  svg.setAttribute("preserveAspectRatio", "none");
  const boxes = cell.boxes ?? [];
  for (const kind of cell.path ? ["halo", "line"] : []) {
    const line = svg.appendChild(document.createElementNS(SVG, "polyline"));
    line.setAttribute("class", `${kind} b0`);
    line.setAttribute("points", cell.path.join(" "));
  }
  const names = [...new Set(boxes.map(box => box[0].replace(/ [\d.]+$/, "")))];
  for (const [label, x, y, width, height] of boxes) {
    const color = `b${names.indexOf(label.replace(/ [\d.]+$/, "")) % 6}`;
    for (const kind of ["halo", "line"]) {
      const rect = svg.appendChild(document.createElementNS(SVG, "rect"));
      rect.setAttribute("class", `${kind} ${color}`);
      Object.entries({ x, y, width, height }).forEach(([key, value]) => rect.setAttribute(key, value));
    }
    if (labels) {
      const text = make("span", { className: `tag ${color}` }, label);
      text.style.left = `${100 * x}%`;
      text.style.top = `${100 * y}%`;
      if (y < 0.08) text.classList.add("inside");
      layer.append(text);
    }
  }
  return layer;
}

/** The picture of a cell, or its clip, enlarged with a player's controls; the frame has the proportions of the tallest picture of all. */
function drawPicture(item, cell, large) {
  const frame = make("div", { className: "frame" });
  const image = "image" in cell ? gallery.images[cell.image] : null;
  if (image === null) {
    frame.append(make("span", { className: "missing" }, "picture missing"));
    return frame;
  }
  const [width, height] = image.size;
  const inner = make("div", { className: image.crisp ? "inner crisp" : "inner" });
  inner.style.setProperty("--shape", width / height);
  const text = `${nameOf(item, cell)}: ${item.prompt}`;
  if (image.clip) {
    inner.append(make("video", {
      src: image.clip, poster: image.src || "", controls: large, loop: true, muted: true, playsInline: true,
      preload: image.src ? "none" : "metadata", tabIndex: -1, "aria-label": text,
    }));
  } else if (image.src) {
    inner.append(make("img", { src: image.src, alt: text, decoding: "async", draggable: false }));
  }
  if ((cell.boxes || cell.path) && !settings.blind) inner.append(drawBoxes(cell, large));
  frame.append(inner);
  if (image.note) frame.append(make("small", { className: "clip-note" }, image.note));
  return frame;
}

function verdict(cell) {
  if (!("right" in cell)) return null;
  return make("span", { className: cell.right ? "verdict-mark good" : "verdict-mark bad" }, cell.right ? "✓ right" : "✗ wrong");
}

function drawSide(item, cell, large) {
  const name = make("div", { className: "who" });
  if (!settings.blind) name.append(make("span", { className: `dot s${cell.side % 8}`, "aria-hidden": "true" }));
  name.append(make("span", { className: "label" }, nameOf(item, cell)));
  const caption = make("figcaption", {}, name);
  if (!settings.blind) {
    if (hasVerdicts) name.append(verdict(cell) ?? "");
    if (hasScores) {
      const list = make("dl", { className: "scores" });
      gallery.scorers.forEach((scorer, i) => {
        const value = cell.scores ? cell.scores[i] : null;
        const others = item.cells.map(other => (other.scores ? other.scores[i] : null)).filter(v => v !== null);
        const best = value !== null && others.length > 1 && value === Math.max(...others) && value !== Math.min(...others);
        list.append(make("div", { className: best ? "best" : "" },
          make("dt", { title: scorer }, scorer), make("dd", {}, shortNumber(value))));
      });
      caption.append(list);
    }
    if (hasReasons) {
      const reason = cell.right === true && !large ? "" : cell.reason ?? "";
      caption.append(make("p", { className: "reason", title: reason }, reason));
    }
  }
  return make("figure", { className: "side", "data-side": cell.side }, drawPicture(item, cell, large), caption);
}

/** What a sample is, in words, for those who do not see it. */
function describe(item) {
  const sides = settings.blind ? [] : item.cells.map(cell => {
    const right = "right" in cell ? (cell.right ? " right" : " wrong") : "";
    return gallery.sides[cell.side] + right;
  });
  return [item.prompt, ...sides, voteText(item)].filter(Boolean).join(", ");
}

function drawCard(item, position, count) {
  const cells = shownCells(item);
  const card = make("article", {
    className: "card", role: "listitem", tabIndex: -1, "data-position": position,
    "aria-posinset": position + 1, "aria-setsize": count, "aria-label": describe(item),
  });
  const sides = make("div", { className: "sides" }, ...cells.map(cell => drawSide(item, cell, false)));
  const facts = [item.task === null ? "" : gallery.tasks[item.task], `seed ${item.seed}`];
  const foot = make("div", { className: "foot" }, make("span", { className: "facts" }, facts.filter(Boolean).join(" · ")));
  if (find("video", sides)) {
    const play = make("button", { type: "button", className: "play", title: "Play or pause together (p)" }, "▶ play");
    play.addEventListener("click", () => playClips(card));
    foot.append(play);
  }
  foot.append(drawVotes(item));
  card.append(make("h3", { title: item.prompt }, item.prompt), sides, foot);
  return card;
}

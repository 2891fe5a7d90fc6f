// One sample enlarged, the keys, and the beginning of it all.

const detail = find("#detail"), help = find("#help");
let detailItem = null;

function showDetail() {
  const item = detailItem = shown[active];
  const step = (text, label, by) => {
    const button = make("button", { type: "button", className: "quiet", "aria-label": label, title: label }, text);
    button.addEventListener("click", () => go(active + by));
    button.disabled = active + by < 0 || active + by >= shown.length;
    return button;
  };
  const close = make("button", { type: "button", className: "quiet" }, "Close");
  close.addEventListener("click", () => detail.close());
  const facts = [
    gallery.sets.length > 1 ? gallery.sets[item.set] : "", item.task === null ? "" : gallery.tasks[item.task],
    `seed ${item.seed}`, `${active + 1} of ${shown.length}`,
  ];
  const bar = make("div", { className: "detail-bar" },
    step("←", "Previous sample", -1), step("→", "Next sample", 1),
    make("span", { className: "facts" }, facts.filter(Boolean).join(" · ")), drawVotes(item), close);
  all(".votes button", bar).forEach(button => { button.tabIndex = 0; });
  const sides = make("div", { className: "sides" });
  sides.style.setProperty("--count", item.cells.length);
  sides.style.setProperty("--ratio", gallery.ratio);
  for (const cell of shownCells(item)) {
    const side = drawSide(item, cell, true);
    if (!settings.blind) {
      const evidence = make("dl", { className: "evidence" });
      for (const [key, value] of Object.entries({ ...cell.evidence, ...(cell.file ? { file: cell.file } : {}) })) {
        evidence.append(make("dt", {}, key), make("dd", {}, value));
      }
      find("figcaption", side).append(evidence);
    }
    sides.append(side);
  }
  detail.replaceChildren(bar, make("h2", {}, item.prompt), sides);
  markVotes(detail, item);
  if (!detail.open) detail.showModal();
  close.focus();
}

detail?.addEventListener("close", () => {
  detail.replaceChildren();
  focusCard(shown.indexOf(detailItem)); // the browser has moved the focus back to where it was before
});

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || help?.open) return;
  const typing = event.target.matches?.("input, select, textarea, video") || event.target.closest?.(".canvas");
  if (typing) return;
  const inGallery = detail.open || list.contains(event.target);
  const row = Math.max(1, Math.floor(innerHeight / (rowHeight + gap))) * columns;
  const moves = detail.open
    ? { ArrowLeft: active - 1, ArrowRight: active + 1, Home: 0, End: shown.length - 1 }
    : {
      ArrowLeft: active - 1, ArrowRight: active + 1, ArrowUp: active - columns, ArrowDown: active + columns,
      Home: 0, End: shown.length - 1, PageUp: active - row, PageDown: active + row,
    };
  let done = true;
  if (inGallery && shown.length && event.key in moves) {
    const there = moves[event.key];
    if (there >= 0 || !["ArrowUp", "ArrowLeft"].includes(event.key)) go(there);
  } else if (inGallery && shown.length && /^\d$/.test(event.key)) voteAndGoOn(Number(event.key));
  else if (inGallery && shown.length && event.key === "x") {
    vote(shown[active], null);
    refresh(shown[active]);
  } else if (inGallery && event.key === "p") playClips(detail.open ? detail : cards.get(active));
  else if (!detail.open && event.key === "Enter" && event.target.matches(".card, .list")) showDetail();
  else if (event.key === "b" && hasBoxes) toggle("boxes");
  else if (!detail.open && event.key === "/") find("input[name=text]").focus();
  else if (event.key === "?") help.showModal();
  else done = false;
  if (done) event.preventDefault();
}

function start() {
  find("#app").hidden = false;
  find("#boxes").hidden = !hasBoxes;
  if (!hasVerdicts) all(".judged", filters).forEach(label => { label.hidden = true; });
  filters.addEventListener("input", applyFilters);
  filters.addEventListener("reset", () => setTimeout(applyFilters));
  filters.addEventListener("submit", event => event.preventDefault());
  for (const name of ["boxes", "blind"]) find(`#${name}`).addEventListener("click", () => toggle(name));
  find("#help-open").addEventListener("click", () => help.showModal());
  list.addEventListener("focusin", event => {
    const card = event.target.closest(".card");
    if (!card || Number(card.dataset.position) === active) return;
    active = Number(card.dataset.position);
    setTabStop();
  });
  list.addEventListener("click", event => {
    const card = event.target.closest(".card");
    if (!card || event.target.closest("button")) return;
    active = Number(card.dataset.position);
    if (event.target.closest(".frame")) showDetail();
    else card.focus({ preventScroll: true });
  });
  document.addEventListener("keydown", onKey);
  let waiting = false;
  addEventListener("scroll", () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      drawNear();
    });
  }, { passive: true });
  let width = list.clientWidth;
  new ResizeObserver(() => {
    if (list.clientWidth === width) return;
    width = list.clientWidth;
    redraw();
  }).observe(list);
  applyFilters();
  showVotes();
}

if (list && gallery.items.length) start();

// Votes: which picture of a sample is best. The browser keeps them; a button saves them as training pairs.

const MEMORY = "diffalign votes";
const TIE = "tie";
const votes = new Map(Object.entries(remembered()));

function remembered() {
  try { return JSON.parse(memory.read(MEMORY)) ?? {}; } catch { return {}; }
}

/** Items of this page; the browser's memory holds those of other reports too. */
const itemsById = new Map(gallery.items.map(item => [item.id, item]));

function vote(item, choice) {
  if (choice === null) votes.delete(item.id);
  else votes.set(item.id, choice);
  memory.write(MEMORY, JSON.stringify(Object.fromEntries(votes)));
  showVotes();
}

/** The choice that a digit stands for: 0 is a tie, 1 the first picture shown. */
function choiceOf(item, digit) {
  if (digit === 0) return TIE;
  const cell = shownCells(item)[digit - 1];
  return cell ? cell.side : undefined;
}

function voteText(item) {
  const choice = votes.get(item.id);
  if (choice === undefined) return "";
  if (choice === TIE) return "voted a tie";
  return `voted for ${nameOf(item, item.cells.find(cell => cell.side === choice) ?? item.cells[0])}`;
}

/** Buttons of a sample, in the order of its pictures. */
function drawVotes(item) {
  const group = make("span", { className: "votes", role: "group", "aria-label": "Which is better?" });
  const choices = [...shownCells(item).map(cell => cell.side), TIE];
  if (choices.length < 3) return group; // one picture has nothing to be compared with
  choices.forEach((choice, i) => {
    const digit = choice === TIE ? 0 : i + 1;
    const text = choice === TIE ? "a tie" : `${nameOf(item, shownCells(item)[i])} is better`;
    const button = make("button", {
      type: "button", tabIndex: -1, title: `${text} (${digit})`, "aria-label": text,
      "aria-pressed": String(votes.get(item.id) === choice), "data-choice": choice,
    }, choice === TIE ? "=" : String(digit));
    button.addEventListener("click", event => {
      event.stopPropagation();
      vote(item, votes.get(item.id) === choice ? null : choice);
      refresh(item);
    });
    group.append(button);
  });
  return group;
}

/** Marks the buttons that are pressed, wherever a sample is shown. */
function markVotes(element, item) {
  for (const button of all(".votes button", element)) {
    const choice = button.dataset.choice === TIE ? TIE : Number(button.dataset.choice);
    button.setAttribute("aria-pressed", String(votes.get(item.id) === choice));
  }
  const choice = votes.get(item.id);
  for (const side of all(".side", element)) {
    side.classList.toggle("chosen", choice !== undefined && choice !== TIE && Number(side.dataset.side) === choice);
  }
}

/** A training pair for every picture that lost against the one voted for. */
function exportedPairs() {
  const pairs = [];
  for (const item of gallery.items) {
    const choice = votes.get(item.id);
    const chosen = item.cells.find(cell => cell.side === choice);
    if (!chosen || !chosen.file) continue;
    for (const cell of item.cells) {
      if (cell === chosen || !cell.file) continue;
      pairs.push({
        id: `${item.id}-${cell.side}`, prompt: item.prompt, chosen: chosen.file, rejected: cell.file, seed: item.seed,
      });
    }
  }
  return pairs;
}

function showVotes() {
  const own = [...votes.keys()].filter(id => itemsById.has(id));
  const pairs = exportedPairs().length, ties = own.filter(id => votes.get(id) === TIE).length;
  const button = find("#save");
  button.disabled = pairs === 0;
  button.textContent = own.length ? `Save votes (${own.length})` : "Save votes";
  button.title = `${pairs} pairs${ties ? `, ${ties} ties left out` : ""}, as ${gallery.votes}`;
}

find("#save")?.addEventListener("click", () => {
  const lines = exportedPairs().map(pair => `${JSON.stringify(pair)}\n`);
  const link = make("a", {
    href: URL.createObjectURL(new Blob(lines, { type: "application/jsonl" })), download: gallery.votes,
  });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
});

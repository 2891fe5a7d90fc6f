"""`label.html`: a page that shows a round's images by prompt and makes `labels.jsonl`; it needs no server."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Labels of TITLE</title>
<style>
  body { font: 16px system-ui, sans-serif; margin: 1rem 2rem 6rem; }
  section { border-top: 1px solid #bbb; padding: .5rem 0 1rem; }
  figure { display: inline-block; margin: .25rem; text-align: center; }
  img, video { display: block; width: 256px; image-rendering: auto; }
  footer { position: fixed; left: 0; right: 0; bottom: 0; padding: .75rem 2rem; background: #eee; }
</style>
<h1>TITLE</h1>
<p>Give each image its place: 1 is the best of its prompt, equal numbers are ties, and an image without a number is left
out. What you choose is remembered by this browser; save it as <code>labels.jsonl</code>, or
<code>labels-yourname.jsonl</code>, beside this page.</p>
<main></main>
<footer><button>Save labels.jsonl</button> <output></output></footer>
<script>
const groups = GROUPS, key = "diffalign TITLE";
const places = JSON.parse(localStorage.getItem(key) || "{}");
const make = (name, parent, text) => {
  const element = parent.appendChild(document.createElement(name));
  if (text !== undefined) element.textContent = text;
  return element;
};
function rankings() {
  return groups.map(group => {
    const placed = group.images.filter(image => places[image.id]);
    const numbers = [...new Set(placed.map(image => places[image.id]))].sort((a, b) => a - b);
    const ranking = numbers.map(n => placed.filter(image => places[image.id] === n).map(image => image.id));
    return placed.length > 1 ? { ranking } : null;
  }).filter(Boolean);
}
function count() {
  document.querySelector("output").textContent = `${rankings().length} of ${groups.length} prompts labelled`;
}
for (const group of groups) {
  const section = make("section", document.querySelector("main"));
  make("h2", section, group.prompt);
  for (const image of group.images) {
    const figure = make("figure", section), select = document.createElement("select");
    const shown = make(image.video ? "video" : "img", figure);
    shown.src = image.file;
    if (image.video) shown.controls = shown.loop = true;
    figure.append(select);
    make("option", select, "no place").value = "";
    group.images.forEach((_, place) => { make("option", select, place + 1).value = place + 1; });
    select.value = places[image.id] || "";
    select.onchange = () => {
      places[image.id] = Number(select.value);
      localStorage.setItem(key, JSON.stringify(places));
      count();
    };
  }
}
document.querySelector("button").onclick = () => {
  const lines = rankings().map(row => JSON.stringify(row) + "\\n");
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob(lines, { type: "application/jsonl" }));
  link.download = "labels.jsonl";
  link.click();
};
count();
</script>
</html>
"""


def labelling_page(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The page of a round.

    Args:
        title: Tells this round from others, in the browser's memory too; plain letters.
        rows: Of the round's index, the images of a prompt together.
    """
    groups = []
    for _, own in groupby(rows, key=lambda row: row["prompt_id"]):
        images = list(own)
        shown = [{"id": r["id"], "file": r.get("image") or r["video"], "video": "video" in r} for r in images]
        groups.append({"prompt": images[0]["prompt"], "images": shown})
    # A prompt may hold what would end the script.
    return _PAGE.replace("TITLE", title).replace("GROUPS", json.dumps(groups).replace("<", "\\u003c"))

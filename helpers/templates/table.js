// The table of claims: a click on a head sorts it, a word, a verdict and a kind of claim filter it.
const find = id => document.getElementById(id), table = document.querySelector("table.claims");
const body = table.tBodies[0], rows = [...body.rows], heads = [...table.tHead.rows[0].cells];

function filter() {
  const word = find("word").value.toLowerCase(), verdict = find("verdict").value, kind = find("kind").value;
  for (const row of rows) {
    row.hidden = !row.textContent.toLowerCase().includes(word)
      || (verdict && row.dataset.verdict !== verdict) || (kind && row.className !== kind);
  }
  find("count").textContent = `${rows.filter(row => !row.hidden).length} of ${rows.length} claims`;
}

function sort(head) {
  const down = head.ariaSort === "ascending", numbers = head.dataset.kind === "number";
  const value = row => row.cells[head.cellIndex].dataset.sort ?? row.cells[head.cellIndex].textContent.trim();
  for (const other of heads) other.ariaSort = other !== head ? "none" : down ? "descending" : "ascending";
  rows.sort((one, two) => {
    const a = value(one), b = value(two);
    if (!a || !b) return !a - !b;  // what is missing comes last, either way
    return (down ? -1 : 1) * (numbers ? a - b : a.localeCompare(b, "en", {numeric: true}));
  });
  body.append(...rows);
}

for (const head of heads) {
  const button = document.createElement("button");
  button.append(...head.childNodes);
  button.onclick = () => sort(head);
  head.append(button);
}
for (const id of ["word", "verdict", "kind"]) find(id).oninput = find(id).onchange = filter;
find("tools").hidden = false;
filter();

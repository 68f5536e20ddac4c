const data = JSON.parse(document.getElementById("data").textContent), all = data.latents, $ = id => document.getElementById(id);
const COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"], canvas = $("map"), pen = canvas.getContext("2d");
const escape = text => text.replace(/[&<>]/g, c => ({"&": "&amp;", "<": "&lt;", ">": "&gt;"}[c])).replace(/\n/g, "⏎");
const radius = latent => 1.5 + 12 * Math.sqrt(latent[3]);
const words = all.map(latent => [...latent[5].map(c => c[1]), ...latent[6]].join(" ").toLowerCase());
let view, found = null, near = new Set(), at = -1, held = null;
function whole() {
  const xs = all.map(l => l[0]), ys = all.map(l => l[1]);
  const left = Math.min(...xs), right = Math.max(...xs), low = Math.min(...ys), high = Math.max(...ys);
  const scale = 0.95 * Math.min(canvas.clientWidth / (right - left || 1), canvas.clientHeight / (high - low || 1));
  view = {x: (left + right) / 2, y: (low + high) / 2, scale};
}
const place = l => [canvas.clientWidth / 2 + (l[0] - view.x) * view.scale, canvas.clientHeight / 2 - (l[1] - view.y) * view.scale];
function draw() {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = canvas.clientWidth * ratio; canvas.height = canvas.clientHeight * ratio;
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  const dot = (i, colour, strength, ring) => {
    const [x, y] = place(all[i]);
    pen.globalAlpha = strength; pen.fillStyle = colour; pen.beginPath(); pen.arc(x, y, radius(all[i]) + (ring ? 2 : 0), 0, 7); pen.fill();
    if (ring) { pen.strokeStyle = "#000"; pen.lineWidth = 1.5; pen.stroke(); }
  };
  all.forEach((l, i) => dot(i, found && !found.has(i) ? "#bbb" : COLOURS[l[2] % COLOURS.length], found ? (found.has(i) ? 0.9 : 0.2) : 0.6, false));
  near.forEach(i => dot(i, "#F0E442", 1, true));
  if (at >= 0) dot(at, "#000", 1, true);
}
function tell() {
  if (at < 0) { $("told").innerHTML = ""; return; }
  const l = all[at], whose = Object.keys(data.near).filter(name => data.near[name].includes(at));
  $("told").innerHTML = `<p><b>latent ${l[4]}</b>, family ${l[2]}, fires on ${(100 * l[3]).toFixed(3)} % of tokens${whose.length ? `; near the vector of ${escape(whose.join(", "))}` : ""}</p>` +
    l[5].map(c => `<p>${escape(c[0])}<mark>${escape(c[1])}</mark>${escape(c[2])}</p>`).join("") + `<p>makes likelier: ${l[6].map(escape).join(" · ")}</p>`;
}
function search() {
  const asked = $("word").value.trim().toLowerCase();
  if (!asked) found = null;
  else if (/^#\d+$/.test(asked)) { at = all.findIndex(l => l[4] === +asked.slice(1)); found = new Set(at < 0 ? [] : [at]); tell(); }
  else found = new Set(words.flatMap((text, i) => text.includes(asked) ? [i] : []));
  $("count").textContent = found ? `${found.size} of ${all.length}` : `${all.length} latents`;
  draw();
}
function point(x, y) {
  let best = 12, i = -1;
  all.forEach((l, j) => { const [px, py] = place(l), d = Math.hypot(px - x, py - y); if (d < best && (!found || found.has(j))) { best = d; i = j; } });
  if (i !== at && i >= 0) { at = i; tell(); draw(); }
}
canvas.onpointerdown = e => { held = [e.offsetX, e.offsetY]; };
canvas.onpointerup = canvas.onpointerleave = () => { held = null; };
canvas.onpointermove = e => {
  if (!held) return point(e.offsetX, e.offsetY);
  view.x -= (e.offsetX - held[0]) / view.scale; view.y += (e.offsetY - held[1]) / view.scale;
  held = [e.offsetX, e.offsetY]; draw();
};
canvas.onwheel = e => {
  e.preventDefault();
  const factor = Math.exp(-e.deltaY / 500), dx = e.offsetX - canvas.clientWidth / 2, dy = canvas.clientHeight / 2 - e.offsetY;
  view.x += dx / view.scale * (1 - 1 / factor); view.y += dy / view.scale * (1 - 1 / factor); view.scale *= factor; draw();
};
for (const name of Object.keys(data.near)) $("behaviour").add(new Option(name, name));
$("behaviour").onchange = () => { near = new Set(data.near[$("behaviour").value] || []); draw(); };
$("word").oninput = search;
$("whole").onclick = () => { whole(); draw(); };
window.onresize = draw;
whole(); search();

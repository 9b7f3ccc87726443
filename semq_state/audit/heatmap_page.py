"""The page of the HTML heat map. Texts reach it as text nodes alone."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>__TITLE__</title>
<style>
body { font: 14px/1.45 system-ui, sans-serif; color: #222; margin: 24px auto; max-width: 1160px; padding: 0 16px; }
h1 { font-size: 20px; margin: 0 0 4px; }
#heading { font-size: 15px; }
#states { color: #777; font: 11px/1.5 ui-monospace, monospace; overflow-wrap: anywhere; }
form { margin: 16px 0 10px; display: flex; gap: 20px; flex-wrap: wrap; align-items: center; }
select { font: inherit; padding: 2px 6px; }
canvas { display: block; width: 100%; cursor: crosshair; }
#tip { position: fixed; display: none; pointer-events: none; background: #fffe; border: 1px solid #bbb;
 border-radius: 4px; padding: 6px 9px; font-size: 13px; white-space: pre; box-shadow: 0 2px 8px #0003; }
#scale { display: flex; align-items: center; gap: 8px; color: #555; font-size: 12px; }
#ramp { width: 220px; height: 12px; cursor: default; }
.key { display: inline-block; width: 12px; height: 12px; border: 1px solid #ccc; vertical-align: -1px; }
#caption { color: #666; font-size: 12px; margin-top: 10px; }
</style>
</head>
<body>
<h1>__TITLE__</h1>
<div id="heading"></div>
<div id="states"></div>
<form>
<label>kind of state <select id="kind"></select></label>
<label>number <select id="metric"></select></label>
<span id="scale"><span id="low"></span><canvas id="ramp" width="220" height="12"></canvas><span id="high"></span>
<span><span class="key" id="equal"></span> equal</span>
<span><span class="key" id="absent"></span> not in both</span>
<span><span class="key" id="infinite"></span> NaN or infinity</span></span>
</form>
<canvas id="map"></canvas>
<div id="caption"></div>
<div id="tip"></div>
<script type="application/json" id="data">__DATA__</script>
<script>
"use strict";
const get = id => document.getElementById(id);
const data = JSON.parse(get("data").textContent);
const rgb = hex => [1, 3, 5].map(i => parseInt(hex.slice(i, i + 2), 16));
const stops = data.stops.map(rgb);
const LEFT = 56, TOP = 24, BOTTOM = 44, ABSENT = -1, INFINITE = -2;

function ramp(t) {
  const x = Math.min(Math.max(t, 0), 1) * (stops.length - 1), i = Math.min(Math.floor(x), stops.length - 2);
  return stops[i].map((v, k) => Math.round(v + (stops[i + 1][k] - v) * (x - i)));
}
function colour(value, scale) {
  if (value === ABSENT) return rgb(data.colours.absent);
  if (value === INFINITE) return rgb(data.colours.infinite);
  if (value === 0) return rgb(data.colours.equal);
  return ramp(Math.log(value / scale[0]) / Math.log(scale[1] / scale[0]));
}
function add(select, value, text) {
  const option = document.createElement("option");
  option.value = value;
  option.textContent = text;
  select.append(option);
}
const panel = () => data.panels[get("kind").value];
const columns = p => Math.ceil((p.stop - p.start) / p.width);

function size() {
  const p = panel(), width = get("map").clientWidth || 1100;
  const row = Math.max(9, Math.min(26, 560 / p.layers.length));
  return {width, row, plot: width - LEFT - 8, height: TOP + BOTTOM + row * p.layers.length};
}
function draw() {
  const p = panel(), metric = get("metric").value, scale = data.scales[metric], s = size();
  const map = get("map"), ratio = window.devicePixelRatio || 1;
  map.width = s.width * ratio;
  map.height = s.height * ratio;
  map.style.height = s.height + "px";
  const pen = map.getContext("2d");
  pen.scale(ratio, ratio);
  pen.font = "12px system-ui, sans-serif";
  const n = columns(p), image = new ImageData(n, p.layers.length);
  p.values[metric].forEach((row, y) => row.forEach((value, x) => {
    image.data.set([...colour(value, scale), 255], 4 * (y * n + x));
  }));
  const small = document.createElement("canvas");
  small.width = n;
  small.height = p.layers.length;
  small.getContext("2d").putImageData(image, 0, 0);
  const bottom = TOP + s.row * p.layers.length, shown = s.plot * n * p.width / (p.stop - p.start);
  pen.save();
  pen.beginPath();
  pen.rect(LEFT, TOP, s.plot, bottom - TOP);
  pen.clip();
  pen.imageSmoothingEnabled = false;
  pen.drawImage(small, LEFT, TOP, shown, bottom - TOP);
  pen.restore();
  pen.strokeStyle = "#999";
  pen.strokeRect(LEFT, TOP, s.plot, bottom - TOP);
  pen.fillStyle = "#333";
  pen.textAlign = "right";
  pen.textBaseline = "middle";
  const every = Math.ceil(p.layers.length / Math.max(1, Math.floor((bottom - TOP) / 18)));
  p.layers.forEach((layer, y) => { if (y % every === 0) pen.fillText(layer, LEFT - 6, TOP + (y + .5) * s.row); });
  pen.textAlign = "center";
  const span = p.stop - p.start, rough = span / 8, power = 10 ** Math.floor(Math.log10(rough));
  const step = Math.max(1, [1, 2, 5, 10].map(x => x * power).find(x => x >= rough));
  for (let at = Math.ceil(p.start / step) * step; at < p.stop; at += step)
    pen.fillText(at, LEFT + (at - p.start) / span * s.plot, bottom + 13);
  pen.fillText("token", LEFT + s.plot / 2, bottom + 32);
  pen.save();
  pen.translate(12, (TOP + bottom) / 2);
  pen.rotate(-Math.PI / 2);
  pen.fillText("layer", 0, 0);
  pen.restore();
  const at = data.parted === null ? data.first : data.parted;
  if (at !== null && at >= p.start && at < p.stop) {
    const x = LEFT + (at - p.start) / span * s.plot;
    pen.strokeStyle = pen.fillStyle = "#0077b6";
    pen.setLineDash([5, 3]);
    pen.beginPath();
    pen.moveTo(x, TOP - 6);
    pen.lineTo(x, bottom);
    pen.stroke();
    pen.setLineDash([]);
    pen.textAlign = x > LEFT + .8 * s.plot ? "right" : "left";
    pen.fillText((data.parted === null ? "states part at " : "tokens part at ") + at, x, TOP - 13);
  }
  get("low").textContent = "≤ " + scale[0].toPrecision(2);
  get("high").textContent = "≥ " + scale[1].toPrecision(2);
  get("caption").textContent = (p.width > 1 ? "A column shows the worst of " + p.width + " tokens. " : "") +
    "Colours are logarithmic. Point at the map for numbers.";
}
function point(event) {
  const p = panel(), s = size(), box = get("map").getBoundingClientRect(), tip = get("tip");
  const token = p.start + Math.floor((event.clientX - box.left - LEFT) / s.plot * (p.stop - p.start));
  const y = Math.floor((event.clientY - box.top - TOP) / s.row), x = Math.floor((token - p.start) / p.width);
  const inside = token >= p.start && token < p.stop && y >= 0 && y < p.layers.length;
  tip.style.display = inside ? "block" : "none";
  if (!inside) return;
  const first = p.start + x * p.width, last = Math.min(first + p.width, p.stop) - 1;
  const lines = ["layer " + p.layers[y] + ", " + p.name + ", token" +
    (last > first ? "s " + first + " to " + last + " (worst)" : " " + first)];
  for (const [name, words] of Object.entries(data.metrics)) {
    const v = p.values[name][y][x];
    lines.push(words + ": " + (v === ABSENT ? "not in both" : v === INFINITE ? "NaN or infinity"
      : name === "share" ? (100 * v).toPrecision(3) + " %" : v.toPrecision(3)));
  }
  tip.textContent = lines.join("\\n");
  const box2 = tip.getBoundingClientRect();
  tip.style.left = Math.min(event.clientX + 14, window.innerWidth - box2.width - 8) + "px";
  tip.style.top = Math.min(event.clientY + 14, window.innerHeight - box2.height - 8) + "px";
}
get("heading").textContent = data.heading;
get("states").textContent = "a " + data.states.a + "\\u2003b " + data.states.b;
data.panels.forEach((p, i) => add(get("kind"), i, p.name));
Object.entries(data.metrics).forEach(([name, words]) => add(get("metric"), name, words));
for (const name of ["equal", "absent", "infinite"]) get(name).style.background = data.colours[name];
const bar = get("ramp").getContext("2d");
for (let x = 0; x < 220; x++) {
  bar.fillStyle = "rgb(" + ramp(x / 219) + ")";
  bar.fillRect(x, 0, 1, 12);
}
get("kind").onchange = get("metric").onchange = window.onresize = draw;
get("map").onmousemove = point;
get("map").onmouseleave = () => { get("tip").style.display = "none"; };
draw();
</script>
</body>
</html>
"""

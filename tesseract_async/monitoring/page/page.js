"use strict";
// Draws what /api/events sends. Everything that comes from the swarm is set as text, never as markup.

const $ = (id) => document.getElementById(id);
let state = null;
const cursors = {}; // prefix -> [row, column]

function colours() {
  const style = getComputedStyle(document.documentElement);
  const get = (name) => style.getPropertyValue(name).trim();
  return { front: get("--front"), soft: get("--soft"), line: get("--line"), empty: get("--empty"), accent: get("--accent") };
}
const dark = () => matchMedia("(prefers-color-scheme: dark)").matches;
// golden-angle hues: neighbours in the list differ, however many there are
const serverColour = (number) => `hsl(${(number * 137.5) % 360} 55% ${dark() ? 60 : 45}%)`;
// one hue from faint to full, so that it reads without telling colours apart
const heat = (share) => `hsl(212 70% ${dark() ? 22 + 48 * share : 90 - 55 * share}%)`;

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}
const number = (value, digits = 0) =>
  value === null || value === undefined ? "–" : value.toLocaleString("en", { maximumFractionDigits: digits });

// a grid of any number of dimensions as a sheet: the first one downwards, the others flattened to the right
function sheet(grid) {
  const rows = grid.size.length > 1 ? grid.size[0] : 1;
  const columns = grid.size.length > 1 ? grid.size.slice(1).reduce((a, b) => a * b, 1) : grid.size[0];
  return { rows, columns };
}
function place(grid, coords) {
  if (grid.size.length === 1) return [0, coords[0]];
  let column = 0;
  for (let i = 1; i < coords.length; i++) column = column * grid.size[i] + coords[i];
  return [coords[0], column];
}

function drawTotals() {
  const totals = state.totals;
  const cards = [
    ["live experts", number(totals.experts)], ["servers", number(totals.servers)],
    ["rows per second", number(totals.rows_per_second)], ["steps per second", number(totals.steps_per_second, 1)],
  ];
  if (totals.loss !== undefined) cards.push(["loss", number(totals.loss, 4)]);
  $("totals").replaceChildren(...cards.map(([label, value]) => {
    const card = element("div");
    card.append(element("b", value), element("span", label));
    return card;
  }));
}

function drawGrids() {
  const holder = $("grids");
  if (state.grids.length === 0) {
    holder.replaceChildren(element("p", "No server is known yet. Start one: tesseract serve --help", "empty"));
    return;
  }
  for (const grid of state.grids) {
    let box = holder.querySelector(`[data-prefix="${CSS.escape(grid.prefix)}"]`);
    if (!box) {
      holder.querySelector(".empty")?.remove();
      box = element("div", undefined, "grid");
      box.dataset.prefix = grid.prefix;
      const canvas = element("canvas");
      canvas.tabIndex = 0;
      canvas.setAttribute("role", "application");
      canvas.addEventListener("keydown", (event) => moveCursor(event, grid.prefix));
      canvas.addEventListener("pointermove", (event) => pointAt(event, grid.prefix));
      canvas.addEventListener("focus", () => { cursors[grid.prefix] ??= [0, 0]; show(grid.prefix); });
      box.append(element("p"), canvas);
      holder.append(box);
    }
    const { rows, columns } = sheet(grid);
    const all = grid.size.reduce((a, b) => a * b, 1);
    const line = `${grid.prefix}: ${grid.experts.length} of ${all} experts live`;
    box.querySelector("p").textContent = line;
    const canvas = box.querySelector("canvas");
    canvas.setAttribute("aria-label", `${line}. Arrow keys move from expert to expert.`);
    drawSheet(canvas, grid, rows, columns);
  }
}

function drawSheet(canvas, grid, rows, columns) {
  const scale = devicePixelRatio || 1, width = canvas.clientWidth;
  const cell = Math.max(2, Math.min(28, Math.floor(width / columns)));
  canvas.style.height = `${cell * rows}px`;
  canvas.width = width * scale;
  canvas.height = cell * rows * scale;
  const draw = canvas.getContext("2d"), colour = colours(), by = $("colour").value;
  draw.scale(scale, scale);
  const gap = cell > 5 ? 1 : 0;
  draw.fillStyle = colour.empty;
  for (let r = 0; r < rows; r++) for (let c = 0; c < columns; c++) draw.fillRect(c * cell, r * cell, cell - gap, cell - gap);
  const column = { version: 3, busy: 4, replicas: 2 }[by];
  const most = column ? Math.max(by === "busy" ? 1 : 0, ...grid.experts.map((expert) => expert[column] ?? 0)) || 1 : 1;
  for (const expert of grid.experts) {
    const [r, c] = place(grid, expert[0]);
    draw.fillStyle = column ? heat((expert[column] ?? 0) / most) : serverColour(expert[1]);
    draw.fillRect(c * cell, r * cell, cell - gap, cell - gap);
  }
  canvas.dataset.cell = cell;
  const cursor = cursors[grid.prefix];
  if (cursor) {
    draw.strokeStyle = colour.front;
    draw.lineWidth = 2;
    draw.strokeRect(cursor[1] * cell + 1, cursor[0] * cell + 1, cell - gap - 2, cell - gap - 2);
  }
}

function show(prefix) {
  const grid = state.grids.find((one) => one.prefix === prefix), cursor = cursors[prefix];
  if (!grid || !cursor) return;
  const expert = grid.experts.find((one) => { const [r, c] = place(grid, one[0]); return r === cursor[0] && c === cursor[1]; });
  if (!expert) {
    $("detail").textContent = `${prefix}, row ${cursor[0]}, column ${cursor[1]}: nobody hosts this expert.`;
  } else {
    const peer = state.peers[expert[1]];
    $("detail").textContent = `${prefix}.${expert[0].join(".")}: hosted by ${peer ? peer.short : "an unknown server"}`
      + `, ${expert[2]} replica${expert[2] === 1 ? "" : "s"}, ${number(expert[3])} optimizer steps, `
      + `its server ${number(100 * expert[4])} % busy.`;
  }
  drawGrids();
}

function moveCursor(event, prefix) {
  const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  if (!step) return;
  event.preventDefault();
  const { rows, columns } = sheet(state.grids.find((one) => one.prefix === prefix));
  const [r, c] = cursors[prefix] ?? [0, 0];
  cursors[prefix] = [Math.max(0, Math.min(rows - 1, r + step[0])), Math.max(0, Math.min(columns - 1, c + step[1]))];
  show(prefix);
}

function pointAt(event, prefix) {
  const cell = Number(event.target.dataset.cell), box = event.target.getBoundingClientRect();
  const { rows, columns } = sheet(state.grids.find((one) => one.prefix === prefix));
  const at = [Math.floor((event.clientY - box.top) / cell), Math.floor((event.clientX - box.left) / cell)];
  if (at[0] < 0 || at[1] < 0 || at[0] >= rows || at[1] >= columns) return;
  if (String(at) === String(cursors[prefix])) return;
  cursors[prefix] = at;
  show(prefix);
}

function drawPlots() {
  const colour = colours();
  for (const canvas of document.querySelectorAll("canvas[data-series]")) {
    const points = state.history.filter((point) => point[canvas.dataset.series] !== undefined);
    const scale = devicePixelRatio || 1, width = canvas.clientWidth, height = 120;
    canvas.width = width * scale;
    canvas.height = height * scale;
    canvas.style.height = `${height}px`;
    canvas.setAttribute("role", "img");
    const draw = canvas.getContext("2d");
    draw.scale(scale, scale);
    draw.fillStyle = colour.soft;
    draw.font = "12px system-ui, sans-serif";
    if (points.length === 0) {
      draw.fillText("nothing yet", 8, 18);
      canvas.setAttribute("aria-label", "nothing yet");
      continue;
    }
    const values = points.map((point) => point[canvas.dataset.series]);
    const most = Math.max(...values) || 1, from = points[0].time, span = Math.max(1, points.at(-1).time - from);
    draw.strokeStyle = colour.accent;
    draw.lineWidth = 1.5;
    draw.beginPath();
    points.forEach((point, index) => {
      const x = 4 + (point.time - from) / span * (width - 8), y = height - 6 - values[index] / most * (height - 30);
      index ? draw.lineTo(x, y) : draw.moveTo(x, y);
    });
    draw.stroke();
    const text = `now ${number(values.at(-1), 3)}, most ${number(most, 3)}, last ${number(span)} s`;
    draw.fillText(text, 8, 16);
    canvas.setAttribute("aria-label", text);
  }
}

function drawPeers() {
  $("peers").replaceChildren(...state.peers.map((peer, index) => {
    const row = element("tr", undefined, peer.error ? "silent" : "");
    const chip = element("span", undefined, "chip");
    chip.style.background = serverColour(index);
    const first = element("td");
    first.append(chip);
    const cells = [
      peer.short, peer.error ?? peer.path ?? peer.addresses[0] ?? "–", peer.rtt === null ? "–" : `${number(1000 * peer.rtt, 1)} ms`,
      number(peer.num_experts), number(peer.rows_per_second), number(peer.steps_per_second, 1),
      `${number(100 * peer.busy)} %`, number(peer.waiting_rows),
    ];
    row.append(first, ...cells.map((text) => element("td", text)));
    row.title = peer.peer_id;
    return row;
  }));
}

function drawLog() {
  $("log").replaceChildren(...state.log.slice().reverse().map(([time, sentence]) => {
    const line = element("li");
    line.append(element("time", new Date(1000 * time).toLocaleTimeString()), document.createTextNode(sentence));
    return line;
  }));
}

function draw() {
  if (!state) return;
  drawTotals(); drawGrids(); drawPlots(); drawPeers(); drawLog();
}

const events = new EventSource("api/events");
events.onmessage = (event) => {
  state = JSON.parse(event.data);
  $("connection").textContent = `live, through node ${state.node.peer_id.slice(0, 8)} (${state.node.role})`;
  $("connection").className = "";
  draw();
};
events.onerror = () => {
  $("connection").textContent = "The node does not answer. Trying again …";
  $("connection").className = "lost";
};
$("colour").addEventListener("change", draw);
addEventListener("resize", draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);

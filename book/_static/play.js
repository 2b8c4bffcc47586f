// Three things to move: an angle, a latent, and the kind of a layer. No library, no request.
"use strict";

(() => {
  const byId = (id) => document.getElementById(id);
  const chosen = (name) => document.querySelector(`input[name="${name}"]:checked`).value;
  const svg = "http://www.w3.org/2000/svg";
  const red = [178, 24, 43], white = [247, 247, 247], blue = [33, 102, 172];

  function element(name, attributes, text = "") {
    const made = document.createElementNS(svg, name);
    Object.entries(attributes).forEach(([key, value]) => made.setAttribute(key, value));
    made.textContent = text;
    return made;
  }

  function random(seed) { // mulberry32, so that every reader sees the same
    return () => {
      seed = (seed + 0x6d2b79f5) | 0;
      let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
      t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
      return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
    };
  }

  function normal(uniform) {
    return () => Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform());
  }

  // A chart with two axes. lines: [{points: [[x, y]], name, class}]; it returns the element.
  const size = { width: 340, height: 300, left: 52, right: 14, top: 24, bottom: 42 };
  function chart({ x, y, lines, labels, cursor, described }) {
    const { width, height, left, right, top, bottom } = size;
    const across = (value) => left + ((value - x.from) / (x.to - x.from)) * (width - left - right);
    const up = (value) => height - bottom - ((value - y.from) / (y.to - y.from)) * (height - bottom - top);
    const made = element("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-labelledby": described });
    for (const tick of y.ticks) {
      made.append(element("line", { class: "grid", x1: left, x2: width - right, y1: up(tick), y2: up(tick) }));
      made.append(element("text", { x: left - 6, y: up(tick) + 4, "text-anchor": "end" }, tick));
    }
    for (const tick of x.ticks) {
      made.append(element("text", { x: across(tick), y: height - bottom + 17, "text-anchor": "middle" }, tick));
    }
    made.append(element("text", { x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle" }, labels[0]));
    made.append(element("text", { x: 4, y: 13 }, labels[1]));
    if (cursor !== undefined) {
      made.append(element("line", { class: "cursor", x1: across(cursor), x2: across(cursor), y1: top, y2: height - bottom }));
    }
    lines.forEach(({ points, name, style }) => {
      const path = points.map(([a, b], at) => `${at ? "L" : "M"}${across(a).toFixed(1)},${up(b).toFixed(1)}`).join("");
      made.append(element("path", { class: `line ${style}`, d: path }));
      if (name) {
        const [a, b] = points[Math.floor(points.length * 0.6)];
        made.append(element("text", { x: across(a), y: up(b) - 7, "text-anchor": "middle" }, name));
      }
    });
    return made;
  }

  // --- Rotation ---------------------------------------------------------------------------------------------------

  const rows = 160;
  const draw = normal(random(7));
  const columns = () => { // two orthogonal columns of length 1 (Gram-Schmidt)
    const first = Array.from({ length: rows }, draw), second = Array.from({ length: rows }, draw);
    const norm = (v) => Math.sqrt(v.reduce((sum, a) => sum + a * a, 0));
    const scaled = (v) => v.map((a) => a / norm(v));
    const unit = scaled(first);
    const inner = unit.reduce((sum, a, at) => sum + a * second[at], 0);
    return [unit, scaled(second.map((a, at) => a - inner * unit[at]))];
  };
  const left = columns(), right = columns();

  function factors(ratio, degrees) {
    const [c, s] = [Math.cos((degrees * Math.PI) / 180), Math.sin((degrees * Math.PI) / 180)];
    const roots = [Math.sqrt(rows), Math.sqrt(rows * ratio)];
    const turned = ([first, second]) => first.map((a, at) => {
      const [p, q] = [a * roots[0], second[at] * roots[1]];
      return [c * p - s * q, s * p + c * q];
    });
    return [turned(left), turned(right)];
  }

  const sign = (value) => (value < 0 ? -1 : 1);
  const dot = (a, b) => a.reduce((sum, value, at) => sum + value * b[at], 0);
  const column = (cloud, k) => cloud.map((point) => point[k]);

  // sum of ell_k sign(u_k) sign(v_k)^T, with the ell of the smallest error: two normal equations
  function errorAt(ratio, degrees) {
    const [u, v] = factors(ratio, degrees);
    const signs = [u, v].map((cloud) => [0, 1].map((k) => column(cloud, k).map(sign)));
    const same = dot(signs[0][0], signs[0][1]) * dot(signs[1][0], signs[1][1]), whole = rows * rows;
    const wanted = [0, 1].map((k) => [0, 1].reduce(
      (sum, m) => sum + dot(signs[0][k], column(u, m)) * dot(signs[1][k], column(v, m)), 0));
    const det = whole * whole - same * same;
    const ell = [(whole * wanted[0] - same * wanted[1]) / det, (whole * wanted[1] - same * wanted[0]) / det];
    const energy = rows * rows * (1 + ratio * ratio); // squares of the two singular values
    return { u, v, signs, ell, error: Math.sqrt(1 - (ell[0] * wanted[0] + ell[1] * wanted[1]) / energy) };
  }

  function drawCloud(u) {
    const made = element("svg", { viewBox: "-3.2 -3.2 6.4 6.4", role: "img", "aria-label": "Rows of U as points, coloured by quadrant" });
    for (const ends of [[-3.2, 0, 3.2, 0], [0, -3.2, 0, 3.2]]) {
      const [x1, y1, x2, y2] = ends;
      made.append(element("line", { class: "grid", x1, y1, x2, y2, "stroke-width": 0.03 }));
    }
    for (const [a, b] of u) {
      const quadrant = (a < 0 ? 2 : 0) + (b < 0 ? 1 : 0);
      made.append(element("circle", { class: `quadrant${quadrant}`, cx: a, cy: -b, r: 0.07 }));
    }
    byId("rotation-cloud").replaceChildren(made);
  }

  function drawMatrices({ u, v, signs, ell }) {
    const canvas = byId("rotation-matrix"), side = 40, gap = 4, limit = 2.5;
    canvas.width = side;
    canvas.height = side + gap;
    const context = canvas.getContext("2d");
    const image = context.createImageData(canvas.width, canvas.height);
    const original = (i, j) => u[i][0] * v[j][0] + u[i][1] * v[j][1];
    const found = (i, j) => ell[0] * signs[0][0][i] * signs[1][0][j] + ell[1] * signs[0][1][i] * signs[1][1][j];
    [original, found].forEach((entry, which) => {
      for (let at = 0; at < (side * side) / 2; at++) {
        const i = Math.floor(at / side), j = at % side;
        const part = Math.max(-1, Math.min(1, entry(i, j) / limit)), end = part < 0 ? red : blue;
        const colour = white.map((from, k) => Math.round(from + (end[k] - from) * Math.abs(part)));
        image.data.set([...colour, 255], 4 * ((i + which * (side / 2 + gap)) * side + j));
      }
    });
    context.putImageData(image, 0, 0);
  }

  const angles = Array.from({ length: 91 }, (_, at) => at);
  const curves = {};
  function drawRotation() {
    const ratio = Number(chosen("rotation-ratio")), degrees = Number(byId("rotation-angle").value);
    curves[ratio] ??= angles.map((angle) => [angle, errorAt(ratio, angle).error]);
    const now = errorAt(ratio, degrees);
    byId("rotation-value").textContent = `${degrees}°`;
    drawCloud(now.u);
    drawMatrices(now);
    byId("rotation-caption").textContent = `A part of W (above) and of its signs with two scales (below): relative error ${now.error.toFixed(3)}`;
    const best = curves[ratio].reduce((a, b) => (b[1] < a[1] ? b : a));
    byId("rotation-chart").replaceChildren(chart({
      x: { from: 0, to: 90, ticks: [0, 30, 60, 90] }, y: { from: 0.6, to: 0.85, ticks: [0.6, 0.65, 0.7, 0.75, 0.8, 0.85] },
      lines: [{ points: curves[ratio], style: "first" }],
      labels: ["angle in degrees", "relative error"], cursor: degrees, described: "rotation-best",
    }));
    byId("rotation-best").textContent =
      `Best at ${best[0]} degrees: ${best[1].toFixed(3)}; along the SVD's axes ${curves[ratio][0][1].toFixed(3)}`;
  }

  // --- A latent ---------------------------------------------------------------------------------------------------

  const steps = 300, rate = 0.002;

  function slope(rule, x) {
    if (rule === "straight") return Math.abs(x) < 1 ? 1 : 0;
    const e = Math.exp(-200 * Math.abs(x)); // 100 (1 - tanh^2(100 x)), accurate where tanh rounds to 1
    return (400 * e) / (1 + e) ** 2;
  }

  function trajectory(start, rule, optimizer, noise) {
    const shake = normal(random(3));
    let x = start, mean = 0, square = 0;
    const path = [[0, x]];
    for (let step = 1; step <= steps; step++) {
      const gradient = (1 + noise * shake()) * slope(rule, x);
      if (optimizer === "descent") {
        x -= (rate / 100) * gradient; // so that SmoothSign moves at the same rate at zero
      } else {
        mean = 0.9 * mean + 0.1 * gradient;
        square = 0.999 * square + 0.001 * gradient * gradient;
        const root = Math.sqrt(square / (1 - 0.999 ** step)) + Number(optimizer);
        x -= (rate * (mean / (1 - 0.9 ** step))) / root;
      }
      path.push([step, x]);
    }
    return path;
  }

  function drawLatent() {
    const start = Number(byId("latent-start").value);
    const settings = [chosen("latent-rule"), chosen("latent-optimizer"), Number(chosen("latent-noise"))];
    const path = trajectory(start, ...settings);
    const values = path.map(([, x]) => x);
    const low = Math.min(-0.1, ...values), high = Math.max(0.1, ...values), room = 0.08 * (high - low);
    byId("latent-value").textContent = start.toFixed(3);
    const crossed = path.filter(([, x], at) => at && (x < 0) !== (path[at - 1][1] < 0));
    const ticks = [0, Number(start.toFixed(2)), Number(values[steps].toFixed(2))];
    byId("latent-path").replaceChildren(chart({
      x: { from: 0, to: steps, ticks: [0, 100, 200, 300] },
      y: { from: low - room, to: high + room, ticks: [...new Set(ticks)] },
      lines: [{ points: path, style: "first" }], labels: ["step", "latent"], described: "latent-caption",
    }));
    const moved = Math.abs(values[steps] - start);
    const times = crossed.length === 1 ? "once" : `${crossed.length} times`;
    byId("latent-caption").textContent = crossed.length
      ? `The sign flips ${times}, first in step ${crossed[0][0]}`
      : start < 0 ? "The sign is what the data want from the start" : `The sign never flips: the latent moves by ${moved.toPrecision(2)}`;
    const starts = Array.from({ length: 121 }, (_, at) => at / 100);
    const reach = starts.map((x) => [x, Math.abs(trajectory(x, ...settings)[steps][1] - x)]);
    const top = Math.max(0.1, ...reach.map(([, y]) => y)) * 1.05;
    byId("latent-reach").replaceChildren(chart({
      x: { from: 0, to: 1.2, ticks: [0, 0.3, 0.6, 0.9, 1.2] },
      y: { from: 0, to: top, ticks: [0, Number((top / 2).toFixed(2)), Number(top.toFixed(2))] },
      lines: [{ points: reach, style: "first" }], labels: ["latent at the start", "distance"],
      cursor: Math.max(0, start), described: "latent-caption",
    }));
  }

  // --- Seven kinds of layer ---------------------------------------------------------------------------------------

  const data = JSON.parse(byId("kinds-data").textContent);
  const said = { q_proj: "queries", k_proj: "keys", v_proj: "values", o_proj: "attention output", gate_proj: "MLP gate", up_proj: "MLP up", down_proj: "MLP down" };
  const methods = { "dual-svid": "Dual-SVID", itq: "Joint-ITQ", admm: "ADMM" };

  function drawKinds() {
    const kind = chosen("kinds-layer");
    const found = data.spectra.find((row) => row.kind === kind);
    const pairs = (energy) => found.fractions.map((share, at) => [share, energy[at]]);
    byId("kinds-energy").replaceChildren(chart({
      x: { from: 0, to: 1, ticks: [0, 0.25, 0.5, 0.75, 1] }, y: { from: 0, to: 1, ticks: [0, 0.5, 1] },
      lines: [{ points: pairs(found.normal_energy), style: "second" }, { points: pairs(found.energy), style: "first" }],
      labels: ["share of ranks kept", "share of the energy"], described: "kinds-caption",
    }));
    const at = found.fractions.indexOf(0.25);
    const percent = (value) => `${Math.round(100 * value)} %`;
    byId("kinds-caption").textContent = `${said[kind]} (${found.d_out} × ${found.d_in}): a quarter of the ranks holds ` +
      `${percent(found.energy[at])} of the energy; in noise (dashed) ${percent(found.normal_energy[at])}`;
    const lines = Object.entries(methods).map(([init, name], which) => ({
      name, style: ["third", "second", "first"][which],
      points: data.errors.filter((row) => row.init === init).map((row) => [row.bits, row.errors[kind]]),
    }));
    byId("kinds-error").replaceChildren(chart({
      x: { from: 0, to: 1.05, ticks: [0.1, 0.3, 0.55, 0.8, 1] }, y: { from: 0, to: 1, ticks: [0, 0.25, 0.5, 0.75, 1] },
      lines, labels: ["bits per weight", "relative error"], described: "kinds-errors",
    }));
    const half = Object.entries(methods).map(([init, name]) =>
      `${name} ${data.errors.find((row) => row.init === init && row.bits === 0.55).errors[kind].toFixed(2)}`);
    byId("kinds-errors").textContent = `Error at 0.55 bits: ${half.join(", ")}`;
  }

  byId("kinds-choice").append(...data.spectra.flatMap(({ kind }, at) => {
    const label = document.createElement("label"), input = document.createElement("input");
    Object.assign(input, { type: "radio", name: "kinds-layer", value: kind, checked: at === 0 });
    label.append(input, ` ${said[kind]}`);
    return [label, " "]; // a line may break between labels
  }));

  for (const [id, redraw] of [["play-rotation", drawRotation], ["play-latent", drawLatent], ["play-kinds", drawKinds]]) {
    byId(id).addEventListener("input", redraw);
    byId(id).hidden = false;
    redraw();
  }
})();

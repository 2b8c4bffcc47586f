// The interactive page: draws what is embedded in it as JSON. No library, no request.
"use strict";

(() => {
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("explore-data").textContent);
  const stops = [...new Set(data.reconstructions.map((row) => row.bits))].sort((a, b) => a - b);
  const names = { "llama2-7b": "Llama-2-7B", "llama2-13b": "Llama-2-13B", "llama2-70b": "Llama-2-70B", "llama3-8b": "Llama-3-8B" };
  const models = [...new Set(data.memory.map((row) => row.model))].sort((a, b) => size(a, 16) - size(b, 16));
  const svg = "http://www.w3.org/2000/svg";
  const red = [178, 24, 43], white = [247, 247, 247], blue = [33, 102, 172];

  function memory(model, bits) {
    return data.memory.find((row) => row.model === model && row.bits === bits);
  }

  function size(model, bits, table = "16") {
    return memory(model, bits).weights_GB[table];
  }

  function chosen(name) {
    return document.querySelector(`input[name="${name}"]:checked`).value;
  }

  function colour(code) { // 0 .. 254, where 127 is zero
    const part = (code - 127) / 127, end = part < 0 ? red : blue;
    return white.map((from, at) => Math.round(from + (end[at] - from) * Math.abs(part)));
  }

  function drawMatrix(canvas, text) {
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const side = data.original.corner;
    canvas.width = canvas.height = side;
    const image = new ImageData(side, side);
    bytes.forEach((code, at) => image.data.set([...colour(code), 255], 4 * at));
    canvas.getContext("2d").putImageData(image, 0, 0);
  }

  function element(name, attributes, text = "") {
    const made = document.createElementNS(svg, name);
    Object.entries(attributes).forEach(([key, value]) => made.setAttribute(key, value));
    made.textContent = text;
    return made;
  }

  const width = 300, height = 300, left = 46, bottom = 42, top = 16, right = 14;
  const logs = [stops[0] * 0.85, stops[stops.length - 1] * 1.12].map(Math.log);
  const most = Math.max(...data.perplexity.map((point) => point.perplexity)) * 1.25;
  const heights = [Math.log(data.dense * 0.85), Math.log(most)];
  const across = (bits) => left + ((Math.log(bits) - logs[0]) / (logs[1] - logs[0])) * (width - left - right);
  const up = (value) => height - bottom - ((Math.log(value) - heights[0]) / (heights[1] - heights[0])) * (height - bottom - top);

  function drawChart(bits) {
    const chart = element("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-labelledby": "explore-perplexity" });
    for (const value of [20, 50, 100, 200].filter((tick) => tick < most)) {
      chart.append(element("line", { class: "grid", x1: left, x2: width - right, y1: up(value), y2: up(value) }));
      chart.append(element("text", { x: left - 6, y: up(value) + 4, "text-anchor": "end" }, value));
    }
    for (const point of data.perplexity) {
      chart.append(element("text", { x: across(point.bits), y: height - bottom + 17, "text-anchor": "middle" }, point.bits));
    }
    const middle = (left + width - right) / 2;
    chart.append(element("text", { x: middle, y: height - 6, "text-anchor": "middle" }, "bits per weight"));
    chart.append(element("text", { x: left, y: 10 }, "WikiText-2 perplexity"));
    chart.append(element("line", { class: "dense", x1: left, x2: width - right, y1: up(data.dense), y2: up(data.dense) }));
    chart.append(element("text", { x: width - right, y: up(data.dense) - 5, "text-anchor": "end" }, "original"));
    chart.append(element("line", { class: "cursor", x1: across(bits), x2: across(bits), y1: top, y2: height - bottom }));
    for (const point of data.perplexity) {
      const here = point.bits === bits;
      chart.append(element("circle", { class: here ? "here" : "", cx: across(point.bits), cy: up(point.perplexity), r: here ? 7 : 5 }));
    }
    byId("explore-chart").replaceChildren(chart);
  }

  function perplexityText(bits) {
    const at = data.perplexity.find((point) => point.bits === bits);
    const said = (point) => `${point.perplexity.toFixed(1)} at ${point.bits}`;
    if (at) return `SmolLM2-135M, trained: perplexity ${said(at)} bits, measured (original ${data.dense.toFixed(1)})`;
    const below = data.perplexity.filter((point) => point.bits < bits).pop();
    const above = data.perplexity.find((point) => point.bits > bits);
    return `Not measured at ${bits} bits; neighbours: ${[below, above].filter(Boolean).map(said).join(", ")}`;
  }

  function cell(name, ...content) {
    const made = document.createElement(name);
    made.append(...content);
    return made;
  }

  function bar(linear, total, longest) {
    const whole = cell("div");
    whole.className = "bar";
    for (const [kind, part] of [["linear", linear], ["rest", total - linear]]) {
      const piece = cell("span");
      piece.className = kind;
      piece.style.width = `${(100 * part) / longest}%`;
      whole.append(piece);
    }
    return whole;
  }

  function drawMemory(bits, table) {
    const longest = Math.max(...models.map((model) => size(model, stops[stops.length - 1])));
    const lines = models.map((model) => {
      const total = size(model, bits, table), dense = size(model, 16);
      const name = cell("th", names[model]);
      name.scope = "row";
      const bars = cell("td", bar(memory(model, bits).linear_GB, total, longest));
      const numbers = [total.toFixed(2), dense.toFixed(1), `${(dense / total).toFixed(1)}x`];
      return cell("tr", name, bars, ...numbers.map((number) => cell("td", number)));
    });
    byId("explore-memory").replaceChildren(...lines);
  }

  function draw() {
    const bits = stops[Number(byId("explore-bits").value)], init = chosen("explore-init");
    const found = data.reconstructions.find((row) => row.bits === bits && row.init === init);
    byId("explore-value").textContent = bits;
    byId("explore-bits").setAttribute("aria-valuetext", `${bits} bits per weight`);
    drawMatrix(byId("explore-picture"), found.pictures.sum);
    const ranks = found.ranks.length === 1 ? `one path, rank ${found.ranks[0]}` : `two paths, ranks ${found.ranks.join(" and ")}`;
    byId("explore-caption").textContent = `Relative error ${found.error.toFixed(2)}: ${ranks}, ${found.stored_bits.toFixed(3)} bits stored`;
    drawChart(bits);
    byId("explore-perplexity").textContent = perplexityText(bits);
    drawMemory(bits, chosen("explore-table"));
  }

  byId("explore-bits").max = stops.length - 1;
  byId("explore-bits").value = stops.indexOf(0.55);
  byId("explore-stops").append(...stops.map((bits, at) => Object.assign(document.createElement("option"), { value: at, label: bits })));
  drawMatrix(byId("explore-original"), data.original.pictures.sum);
  byId("explore").addEventListener("input", draw);
  byId("explore").hidden = false;
  draw();
})();

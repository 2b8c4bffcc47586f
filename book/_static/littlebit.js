// Run a packed Llama-like model in plain JavaScript: y = h (U (ell (V^T (g x)))) over the packed signs.
//
// The method is that of the CPU kernels (fast/kernels/cpu.py): the signs of eight neighbouring inputs choose one of 256
// sums, which are computed once for all rows. Nothing is unpacked. `Model` takes what book/_ext/browser_model.py wrote.
"use strict";

(function (root) {
  const FEW_ROWS = 160; // below this, 2 x 16 sums for each byte cost less than 256

  function bytesOf(base64) {
    const text = atob(base64), bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    return bytes;
  }

  function floatsOf(bytes, start, count) { // float16 -> float64, in which JavaScript computes
    const halves = new Uint16Array(bytes.slice(start, start + 2 * count).buffer), floats = new Float64Array(count);
    for (let i = 0; i < count; i++) {
      const sign = halves[i] >> 15 ? -1 : 1, exponent = halves[i] >> 10 & 31, fraction = halves[i] & 1023;
      floats[i] = sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -24 * fraction);
    }
    return floats;
  }

  // A matrix of packed signs, (rows, n): byte k of row i is stored at k * rows + i, so that sums of one byte stay near.
  class Signs {
    constructor(bytes, start, rows, stride, n) {
      this.rows = rows;
      this.count = Math.ceil(n / 8); // bytes that hold signs
      this.bytes = new Uint8Array(this.count * rows);
      for (let i = 0; i < rows; i++)
        for (let k = 0; k < this.count; k++) this.bytes[k * rows + i] = bytes[start + i * stride + k];
    }

    multiply(x, y) { // x is padded with zeros to whole bytes; y has room for `rows` numbers
      const { rows, count, bytes } = this;
      y.fill(0, 0, rows);
      if (rows < FEW_ROWS) {
        const low = Signs.low, high = Signs.high;
        for (let k = 0; k < count; k++) {
          sums(x, 8 * k, 4, low);
          sums(x, 8 * k + 4, 4, high);
          for (let i = 0, at = k * rows; i < rows; i++, at++) {
            const byte = bytes[at];
            y[i] += low[byte & 15] + high[byte >> 4];
          }
        }
      } else {
        const table = Signs.table;
        for (let k = 0; k < count; k++) {
          sums(x, 8 * k, 8, table);
          for (let i = 0, at = k * rows; i < rows; i++, at++) y[i] += table[bytes[at]];
        }
      }
    }
  }
  Signs.low = new Float64Array(16);
  Signs.high = new Float64Array(16);
  Signs.table = new Float64Array(256);

  function sums(x, start, n, table) { // table[code] = sum of x[start + j] with the signs of code: bit 1 is -1
    let all = 0;
    for (let j = 0; j < n; j++) all += x[start + j];
    table[0] = all;
    for (let j = 0, size = 1; j < n; j++, size *= 2) {
      const twice = 2 * x[start + j];
      for (let code = 0; code < size; code++) table[size + code] = table[code] - twice;
    }
  }

  class Layer {
    constructor(entry, bytes) {
      this.dOut = entry.d_out;
      this.paths = entry.paths.map((path) => ({
        v: new Signs(bytes, path.v, path.rank, path.v_stride, entry.d_in),
        u: new Signs(bytes, path.u, entry.d_out, path.u_stride, path.rank),
        h: floatsOf(bytes, path.h, entry.d_out),
        ell: floatsOf(bytes, path.ell, path.rank),
        g: floatsOf(bytes, path.g, entry.d_in),
        a: new Float64Array(8 * Math.ceil(entry.d_in / 8)),
        t: new Float64Array(8 * Math.ceil(path.rank / 8)),
      }));
      this.z = new Float64Array(entry.d_out);
    }

    run(x, y) {
      y.fill(0, 0, this.dOut);
      for (const { v, u, h, ell, g, a, t } of this.paths) {
        for (let j = 0; j < g.length; j++) a[j] = g[j] * x[j];
        v.multiply(a, t);
        for (let k = 0; k < ell.length; k++) t[k] *= ell[k];
        u.multiply(t, this.z);
        for (let i = 0; i < this.dOut; i++) y[i] += h[i] * this.z[i];
      }
    }
  }

  function norm(x, weight, eps, out) {
    let squares = 0;
    for (let j = 0; j < x.length; j++) squares += x[j] * x[j];
    const factor = 1 / Math.sqrt(squares / x.length + eps);
    for (let j = 0; j < x.length; j++) out[j] = x[j] * factor * weight[j];
  }

  class Model {
    constructor(layers, table) {
      const { sizes } = layers, bytes = bytesOf(layers.data), entries = bytesOf(table.data);
      this.sizes = sizes;
      this.blocks = layers.blocks.map((block) => ({
        norms: block.norms.map((start) => floatsOf(bytes, start, sizes.hidden)),
        layers: Object.fromEntries(Object.entries(block.layers).map(([name, entry]) => [name, new Layer(entry, bytes)])),
        keys: [],
        values: [],
      }));
      this.lastNorm = floatsOf(bytes, layers.norm, sizes.hidden);
      const codes = sizes.vocabulary * sizes.hidden;
      this.codes = new Int8Array(entries.buffer, 0, codes);
      this.groups = sizes.hidden / table.group;
      this.scale = floatsOf(entries, codes, sizes.vocabulary * this.groups);
      this.position = 0;
      const { hidden, heads, kvHeads, size, wide } = sizes;
      const room = { x: hidden, n: hidden, d: hidden, q: heads * size, o: heads * size, k: kvHeads * size, v: kvHeads * size };
      for (const [name, count] of Object.entries({ ...room, gate: wide, up: wide })) this[name] = new Float64Array(count);
      this.logits = new Float32Array(sizes.vocabulary);
    }

    forget() {
      this.position = 0;
      for (const block of this.blocks) block.keys.length = block.values.length = 0;
    }

    rotate(x, count) { // RoPE
      const half = this.sizes.size / 2;
      for (let j = 0; j < half; j++) {
        const angle = this.position * this.sizes.theta ** (-j / half), c = Math.cos(angle), s = Math.sin(angle);
        for (let head = 0; head < count; head++) {
          const at = head * 2 * half + j, low = x[at], high = x[at + half];
          x[at] = low * c - high * s;
          x[at + half] = high * c + low * s;
        }
      }
    }

    attend(block) { // o = softmax(q k / sqrt(size)) v, for each head
      const { heads, kvHeads, size } = this.sizes, count = block.keys.length, weights = new Float64Array(count);
      this.o.fill(0);
      for (let head = 0; head < heads; head++) {
        const q = head * size, kv = Math.floor(head / (heads / kvHeads)) * size;
        let largest = -Infinity, total = 0;
        for (let s = 0; s < count; s++) {
          let score = 0;
          for (let j = 0; j < size; j++) score += this.q[q + j] * block.keys[s][kv + j];
          weights[s] = score / Math.sqrt(size);
          largest = Math.max(largest, weights[s]);
        }
        for (let s = 0; s < count; s++) total += weights[s] = Math.exp(weights[s] - largest);
        for (let s = 0; s < count; s++)
          for (let j = 0; j < size; j++) this.o[q + j] += weights[s] / total * block.values[s][kv + j];
      }
    }

    read(token, wanted = true) { // one more token; returns the logits after it unless they are not wanted
      const { hidden, heads, kvHeads, eps } = this.sizes, { x, n, d, q, k, v, o, gate, up } = this;
      const group = hidden / this.groups;
      for (let j = 0; j < hidden; j++)
        x[j] = this.codes[token * hidden + j] * this.scale[token * this.groups + Math.floor(j / group)];
      for (const block of this.blocks) {
        const { layers } = block;
        norm(x, block.norms[0], eps, n);
        layers.q_proj.run(n, q);
        layers.k_proj.run(n, k);
        layers.v_proj.run(n, v);
        this.rotate(q, heads);
        this.rotate(k, kvHeads);
        block.keys.push(k.slice());
        block.values.push(v.slice());
        this.attend(block);
        layers.o_proj.run(o, d);
        for (let j = 0; j < hidden; j++) x[j] += d[j];
        norm(x, block.norms[1], eps, n);
        layers.gate_proj.run(n, gate);
        layers.up_proj.run(n, up);
        for (let j = 0; j < gate.length; j++) gate[j] *= up[j] / (1 + Math.exp(-gate[j]));
        layers.down_proj.run(gate, d);
        for (let j = 0; j < hidden; j++) x[j] += d[j];
      }
      this.position++;
      return wanted ? this.head() : null;
    }

    head() { // logits = table RMSNorm(x)
      const { hidden, vocabulary, eps } = this.sizes, { n, codes, scale, groups, logits } = this;
      const group = hidden / groups;
      norm(this.x, this.lastNorm, eps, n);
      for (let token = 0; token < vocabulary; token += 4) { // four rows at a time read n once (the last ones again)
        const row = Math.min(token, vocabulary - 4), first = row * hidden;
        let l0 = 0, l1 = 0, l2 = 0, l3 = 0;
        for (let g = 0; g < groups; g++) {
          let a = 0, b = 0, c = 0, d = 0;
          for (let j = g * group, end = j + group, at = first + j; j < end; j++, at++) {
            const x = n[j];
            a += codes[at] * x;
            b += codes[at + hidden] * x;
            c += codes[at + 2 * hidden] * x;
            d += codes[at + 3 * hidden] * x;
          }
          const s = row * groups + g;
          l0 += scale[s] * a;
          l1 += scale[s + groups] * b;
          l2 += scale[s + 2 * groups] * c;
          l3 += scale[s + 3 * groups] * d;
        }
        logits[row] = l0;
        logits[row + 1] = l1;
        logits[row + 2] = l2;
        logits[row + 3] = l3;
      }
      return logits;
    }
  }

  // Byte-level BPE, as GPT-2 has it.
  class Tokenizer {
    constructor({ vocabulary, merges, pattern, special }) {
      this.numbers = new Map(vocabulary.map((piece, number) => [piece, number]));
      this.pieces = vocabulary;
      this.ranks = new Map(merges.map((pair, rank) => [pair, rank]));
      this.pattern = new RegExp(pattern, "gu");
      this.special = new Set(special);
      this.characters = [];
      let next = 256;
      for (let byte = 0; byte < 256; byte++) {
        const printable = (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
        this.characters.push(String.fromCodePoint(printable ? byte : next++));
      }
      this.bytes = new Map(this.characters.map((character, byte) => [character, byte]));
    }

    encode(text) {
      const numbers = [];
      for (const [word] of text.matchAll(this.pattern)) {
        let parts = Array.from(new TextEncoder().encode(word), (byte) => this.characters[byte]);
        for (;;) {
          let best = Infinity, at = -1;
          for (let i = 0; i + 1 < parts.length; i++) {
            const rank = this.ranks.get(parts[i] + " " + parts[i + 1]);
            if (rank < best) [best, at] = [rank, i];
          }
          if (at < 0) break;
          parts.splice(at, 2, parts[at] + parts[at + 1]);
        }
        numbers.push(...parts.map((part) => this.numbers.get(part)));
      }
      return numbers;
    }

    decode(numbers) {
      const bytes = [];
      for (const number of numbers)
        if (!this.special.has(number)) for (const each of this.pieces[number]) bytes.push(this.bytes.get(each));
      return new TextDecoder().decode(new Uint8Array(bytes));
    }
  }

  function largest(values) {
    let best = 0;
    for (let i = 1; i < values.length; i++) if (values[i] > values[best]) best = i;
    return best;
  }

  // Sample at a temperature among the tokens at least a twentieth as likely as the likeliest (min-p).
  function sampled(values, temperature) {
    const most = values[largest(values)], floor = most + temperature * Math.log(0.05), kept = [];
    let total = 0;
    for (let i = 0; i < values.length; i++)
      if (values[i] >= floor) kept.push([i, (total += Math.exp((values[i] - most) / temperature))]);
    const at = Math.random() * total;
    return kept.find(([, sum]) => sum >= at)[0];
  }

  root.LittleBit = { Model, Tokenizer, largest, sampled };
})(typeof module === "undefined" ? window : module.exports);

// The page on which a packed model writes: load the scripts that hold it, and show token after token.
"use strict";

(function () {
  const at = (id) => document.getElementById(`write-${id}`);
  const folder = new URL("model/", document.currentScript.src);
  const state = { model: null, name: "", words: null, running: false };

  function load(name) {
    return new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.src = new URL(`${name}.js`, folder);
      script.onload = () => (script.remove(), resolve());
      script.onerror = () => (script.remove(), reject(new Error(`${script.src} is missing: build the book with make book`)));
      document.head.append(script);
    });
  }

  async function prepare() {
    const name = at("model").value;
    if (state.name === name) return;
    at("status").textContent = "Reading the model …";
    if (!LittleBit.table) await load("shared");
    await load(name);
    await new Promise((resolve) => setTimeout(resolve));
    state.words = state.words || new LittleBit.Tokenizer(LittleBit.words);
    state.model = new LittleBit.Model(LittleBit.layers, LittleBit.table);
    state.name = at("app").dataset.model = name;
    LittleBit.layers = null;
  }

  const channel = new MessageChannel();
  function pause() { // let the page draw, without the 4 ms of a timer
    return new Promise((resolve) => {
      channel.port1.onmessage = resolve;
      channel.port2.postMessage(null);
    });
  }

  async function write() {
    await prepare();
    const { model, words } = state, prompt = at("prompt").value, temperature = Number(at("temperature").value);
    const numbers = words.encode(prompt), wanted = Number(at("length").value), written = [];
    if (!numbers.length) throw new Error("Type a few words first.");
    model.forget();
    for (const number of numbers.slice(0, -1)) model.read(number, false);
    let token = numbers[numbers.length - 1];
    const begin = performance.now();
    while (state.running && written.length < wanted) {
      const logits = model.read(token);
      token = temperature ? LittleBit.sampled(logits, temperature) : LittleBit.largest(logits);
      if (LittleBit.words.stop.includes(token)) break;
      written.push(token);
      const rate = (1000 * written.length) / (performance.now() - begin);
      at("answer").textContent = words.decode(written);
      at("status").textContent = `${written.length} tokens, ${rate.toFixed(1)} tokens/s`;
      at("status").dataset.rate = rate;
      await pause();
    }
    at("status").dataset.tokens = JSON.stringify(written);
  }

  async function pressed() {
    if (state.running) {
      state.running = false;
      return;
    }
    state.running = true;
    at("button").textContent = "Stop";
    at("given").textContent = at("prompt").value;
    at("answer").textContent = "";
    delete at("status").dataset.tokens;
    at("status").textContent = "";
    try {
      await write();
    } catch (error) {
      at("status").textContent = error.message;
    }
    state.running = false;
    at("button").textContent = "Write";
  }

  at("button").addEventListener("click", pressed);
  at("app").hidden = false;
})();

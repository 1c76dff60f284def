"use strict";
// The page at /: a history, filters, two lists side by side, and a slate as it is written. It asks this server alone.
(() => {
  const at = (id) => document.getElementById(id);
  const make = (tag, name, text) => Object.assign(document.createElement(tag), { className: name || "", textContent: text ?? "" });
  const history = [], MOST_FOUND = 20;
  let token = "", policies = [], asked = 0, writing = 0;
  const timers = new Map();

  const ask = async (path, query) => {
    const headers = { ...(query && { "content-type": "application/json" }), ...(token && { authorization: `Bearer ${token}` }) };
    const got = await fetch(path, { method: query ? "POST" : "GET", headers, body: query && JSON.stringify(query) });
    const answer = await got.json();
    if (got.ok) return answer;
    if (got.status === 401) at("entry").hidden = false;
    throw Object.assign(new Error(answer.error), { status: got.status });
  };
  const later = (call, wait = 120) => { clearTimeout(timers.get(call)); timers.set(call, setTimeout(call, wait)); };
  const say = (place, text, problem) => { place.textContent = text; place.classList.toggle("problem", Boolean(problem)); };

  const filters = () => {
    const [only, without] = [at("category-in").value.trim(), at("category-out").value.trim()];
    return {
      ...(only && { categories_in: [only] }),
      ...(without && { categories_out: [without] }),
      cold_only: at("cold").checked,
    };
  };
  const base = (policy) => ({
    history: history.map((item) => item.item_id), k: Number(at("k").value), policy,
    exclude_history: at("fresh").checked, filters: filters(),
  });
  const listFilters = () => ({
    ...(at("most").value !== at("most").max && { max_per_category: Number(at("most").value) }),
    ...(at("floor").value !== at("floor").min && { min_score: Number(at("floor").value) }),
  });

  const describe = (item, only) => {
    const under = make("div", "under");
    if (item.cold) under.append(make("span", "mark cold", "cold"));
    if (only) under.append(make("span", "mark only", "only here"));
    under.append(...item.categories.map((name) => make("span", "", name)), make("span", "", item.item_id));
    return under;
  };
  const line = (item) => {
    const row = make("div", "line");
    row.append(make("span", "", item.title), make("span", "score", item.score.toFixed(2)));
    return row;
  };

  const refresh = async () => {
    const turn = ++asked, said = at("said"), begun = performance.now();
    at("empty").hidden = history.length > 0;
    if (!history.length) {
      [0, 1].forEach((side) => at(`list-${side}`).replaceChildren());
      return say(said, "Choose a history.");
    }
    try {
      const names = [0, 1].map((side) => at(`policy-${side}`).value);
      const queries = names.map((policy) => ({ ...base(policy), filters: { ...filters(), ...listFilters() } }));
      const { answers } = await ask("recommend/batch", { queries });
      if (turn !== asked) return;
      const ids = answers.map((answer) => new Set(answer.items.map((item) => item.item_id)));
      answers.forEach((answer, side) => at(`list-${side}`).replaceChildren(...answer.items.map((item) => {
        const entry = make("li");
        entry.append(line(item), describe(item, names[0] !== names[1] && !ids[1 - side].has(item.item_id)));
        return entry;
      })));
      const both = [...ids[0]].filter((id) => ids[1].has(id)).length;
      const counts = answers.map((answer, side) => `${answer.items.length} by ${names[side]}`).join(", ");
      const short = answers.map((answer) => answer.short).filter(Boolean).map((text) => ` (${text})`);
      say(said, `${counts}; ${both} in both${[...new Set(short)].join("")}. ${Math.round(performance.now() - begun)} ms.`);
    } catch (error) {
      if (turn === asked) say(said, error.message, true);
    }
  };

  const showHistory = () => {
    at("history").replaceChildren(...history.map((item, place) => {
      const entry = make("li");
      const drop = Object.assign(make("button", "", "remove"), { type: "button", ariaLabel: `Remove ${item.title}` });
      drop.addEventListener("click", () => {
        history.splice(place, 1);
        showHistory();
        (at("history").querySelectorAll("button")[Math.min(place, history.length - 1)] || at("words")).focus();
      });
      entry.append(drop, make("span", "", item.title));
      return entry;
    }));
    writing++;  // what was written was for another history
    at("slate").replaceChildren();
    say(at("written"), "");
    refresh();
  };
  const show = (items, text, problem) => {
    at("found").replaceChildren(...items.map((item) => {
      const entry = make("li"), choose = Object.assign(make("button", "", item.title), { type: "button" });
      choose.append(describe(item));
      choose.addEventListener("click", () => add(item));
      entry.append(choose);
      return entry;
    }));
    say(at("hits"), text, problem);
  };
  const add = (item) => { history.push(item); show([], ""); at("words").value = ""; showHistory(); at("words").focus(); };
  const search = async () => {
    const words = at("words").value.trim();
    if (!words) return show([], "");
    try {
      const { items } = await ask(`items?limit=${MOST_FOUND}&words=${encodeURIComponent(words.slice(0, 200))}`);
      if (!items.length) items.push(await ask(`items/${encodeURIComponent(words)}`));
      if (words !== at("words").value.trim()) return;
      show(items, items.length === MOST_FOUND ? `the ${MOST_FOUND} taken most often; more words find fewer` : `${items.length} found`);
    } catch (error) {
      if (words !== at("words").value.trim()) return;
      show([], error.status === 404 ? "No title holds these words, and no item has this id." : error.message, error.status !== 404);
    }
  };

  const write = async () => {
    const turn = ++writing, slate = at("slate"), said = at("written");
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    const pause = (wait) => new Promise((done) => { setTimeout(done, still ? 0 : wait); });
    slate.replaceChildren();
    if (!history.length) return say(said, "Choose a history.");
    const temperature = Number(at("temperature").value);
    const query = { ...base(at("policy-2").value), kind: "slate", temperature, ...(temperature && { seed: Number(at("seed").value) }) };
    say(said, "Writing …");
    try {
      const answer = await ask("recommend", query);
      for (const item of answer.items) {
        if (turn !== writing) return;
        const entry = make("li"), codes = make("div", "codes");
        entry.append(codes);
        slate.append(entry);
        for (const [place, token] of item.tokens.entries()) {
          const code = make("span", "code", token), free = item.logprobs[place];
          code.append(make("small", "", free === undefined ? "·" : Math.exp(free).toPrecision(2)));
          codes.append(code);
          await pause(140);
          if (turn !== writing) return;
        }
        entry.prepend(line(item));
        entry.append(describe(item));
        await pause(140);
      }
      say(said, `${answer.items.length} items written by ${answer.policy}${answer.seed === null ? ", greedy" : `, seed ${answer.seed}`}${answer.short ? ` (${answer.short})` : ""}.`);
    } catch (error) {
      if (turn === writing) say(said, error.message, true);
    }
  };

  const begin = async () => {
    try {
      const info = await ask("info");
      at("entry").hidden = true;
      policies = info.policies;
      at("run").textContent = `Try ${info.run}`;
      say(at("about"), `${info.items.toLocaleString("en")} items, ${info.cold_items.toLocaleString("en")} of them cold; ${policies.length} ${policies.length === 1 ? "policy" : "policies"}; version ${info.version}.`);
      [0, 1, 2].forEach((side) => {
        at(`policy-${side}`).replaceChildren(...policies.map((name) => new Option(name, name)));
      });
      at("policy-1").value = policies.find((name) => !["policy", "policy-refit", "policy-all-at-once"].includes(name)) || policies.at(-1);
      at("categories").replaceChildren(...Object.entries(info.categories).map(([name, size]) => new Option(`${size} items`, name)));
    } catch (error) {
      say(at("about"), error.message, true);
      if (error.status === 503) later(begin, 2000);
    }
  };

  for (const input of document.querySelectorAll("input[type=range]")) {
    const shown = document.querySelector(`output[for="${input.id}"]`);
    const off = { most: input.max, floor: input.min }[input.id];
    const tell = () => {
      shown.textContent = input.value === off ? "any" : input.step.includes(".") ? Number(input.value).toFixed(1) : input.value;
      input.setAttribute("aria-valuetext", shown.textContent);
    };
    input.addEventListener("input", tell);
    tell();
  }
  at("filters").addEventListener("input", () => later(refresh));
  at("filters").addEventListener("submit", (event) => event.preventDefault());
  at("words").addEventListener("input", () => later(search));
  [0, 1].forEach((side) => at(`policy-${side}`).addEventListener("change", refresh));
  at("often").addEventListener("click", async () => {
    try {
      const { items } = await ask("items?limit=3");
      history.splice(0, history.length, ...items);
      showHistory();
    } catch (error) {
      say(at("said"), error.message, true);
    }
  });
  at("clear").addEventListener("click", () => { history.length = 0; showHistory(); });
  at("writing").addEventListener("submit", (event) => { event.preventDefault(); write(); });
  at("entry").addEventListener("submit", (event) => { event.preventDefault(); token = at("token").value; begin(); });
  begin();
})();

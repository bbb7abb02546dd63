"use strict";
// The answers side by side. Their text is only ever set as text. The filters live in the page's address behind "#".
(() => {
  const block = document.getElementById("data");
  openTarget();
  addEventListener("hashchange", openTarget);
  if (!block) return;

  const data = JSON.parse(block.textContent);
  const PAGE = 10;
  const NOBODY = "(nobody alone)";
  const at = (id) => document.getElementById(id);
  const fields = { category: at("category"), judge: at("judge"), winner: at("winner"), q: at("q") };
  let page = 1;

  for (const name of data.categories) option(fields.category, name);
  for (const name of data.judges) option(fields.judge, name);
  for (const name of [...data.systems, NOBODY]) option(fields.winner, name);
  fields.category.parentElement.hidden = data.categories.length < 2;
  fields.judge.parentElement.hidden = data.judges.length < 2;
  fields.winner.parentElement.hidden = !data.judges.length;
  const words = data.samples.map((one) =>
    [...one.prompt.map((turn) => turn[1]), ...one.answers.map((answer) => answer.text)].join("\n").toLowerCase());

  for (const field of Object.values(fields)) field.addEventListener("input", () => turn(1));
  at("filters").addEventListener("submit", (event) => event.preventDefault());
  at("previous").addEventListener("click", () => turn(page - 1));
  at("next").addEventListener("click", () => turn(page + 1));
  addEventListener("hashchange", () => { if (location.hash.includes("=")) { read(); show(); } });
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
    const box = at("samples").getBoundingClientRect();
    if (event.key === "/") { event.preventDefault(); fields.q.focus(); }
    else if (box.top > innerHeight || box.bottom < 0) return;
    else if (event.key === "ArrowLeft") turn(page - 1);
    else if (event.key === "ArrowRight") turn(page + 1);
  });
  for (const id of ["filters", "paging", "hint"]) at(id).hidden = false;
  read();
  show();

  // A link to a run opens what it leads to.
  function openTarget() {
    const target = document.getElementById(location.hash.slice(1));
    if (target && target.tagName === "DETAILS") target.open = true;
  }

  function option(select, name) {
    select.append(new Option(name, name));
  }

  function read() {
    const given = new URLSearchParams(location.hash.includes("=") ? location.hash.slice(1) : "");
    for (const [name, field] of Object.entries(fields)) {
      const value = given.get(name) ?? "";
      const known = field.tagName !== "SELECT" || [...field.options].some((one) => one.value === value);
      field.value = known ? value : field.options[0].value;
      if (field === fields.judge && !field.value) field.selectedIndex = 0;
    }
    page = Number.parseInt(given.get("page") ?? "1", 10) || 1;
  }

  function turn(to) {
    page = to;
    show();
    const given = new URLSearchParams();
    for (const [name, field] of Object.entries(fields)) {
      if (field.value && !(name === "judge" && field.selectedIndex === 0)) given.set(name, field.value);
    }
    if (page > 1) given.set("page", page);
    history.replaceState(null, "", "#" + (given.size === 0 ? "samples" : given));
  }

  function matches(one, i) {
    const { category, judge, winner, q } = fields;
    if (category.value && one.category !== category.value) return false;
    if (winner.value) {
      const won = one.winners[judge.value];
      if (won === undefined || won !== (winner.value === NOBODY ? "" : winner.value)) return false;
    }
    return q.value.toLowerCase().split(/\s+/).every((word) => words[i].includes(word));
  }

  function show() {
    const found = data.samples.filter(matches);
    const pages = Math.max(1, Math.ceil(found.length / PAGE));
    page = Math.min(Math.max(page, 1), pages);
    at("count").textContent = `${found.length} of ${data.samples.length} prompts`;
    at("page").textContent = `page ${page} of ${pages}`;
    at("previous").disabled = page === 1;
    at("next").disabled = page === pages;
    at("list").replaceChildren(...found.slice((page - 1) * PAGE, page * PAGE).map(sample));
  }

  function make(tag, style, ...inside) {
    const element = document.createElement(tag);
    if (style) element.className = style;
    element.append(...inside.filter((one) => one !== null));
    return element;
  }

  function sample(one) {
    const won = one.winners[fields.judge.value];
    const prompt = one.prompt.map(([role, content]) => make("p", "turn", role ? make("span", "role", role) : null, content));
    return make("article", "sample",
      make("h3", "", [one.category, verdictOf(won)].filter(Boolean).join(" · ")),
      ...prompt,
      make("div", "answers", ...one.answers.map((answer) => said(answer, won === answer.system))),
      one.rulings.length ? make("details", "", make("summary", "", "Verdicts"), make("ul", "", ...one.rulings.flatMap(ruling))) : null);
  }

  function verdictOf(won) {
    if (won === undefined) return "";
    return won === "" ? "nobody wins alone" : `${won} wins`;
  }

  function said(answer, hasWon) {
    const about = [];
    if (answer.gold !== undefined) about.push(`gold ${answer.gold.toFixed(2)}`);
    for (const [name, value] of Object.entries(answer.scores ?? {})) about.push(`${name} ${value.toFixed(2)}`);
    if (answer.tokens !== undefined) about.push(`${answer.tokens} tokens`);
    if (answer.cut) about.push("cut off");
    const element = make("div", hasWon ? "answer won" : "answer",
      make("h4", "", answer.system, about.length ? make("span", "", about.join(", ")) : null),
      make("p", answer.text.trim() ? "said" : "said empty", answer.text.trim() || "(nothing)"),
      answer.criteria ? make("details", "", make("summary", "", "Criteria"), make("ul", "", ...answer.criteria.map(criterion))) : null);
    element.style.setProperty("--series", `var(--series-${data.systems.indexOf(answer.system) % 8})`);
    return element;
  }

  function criterion([name, points, outOf, why]) {
    return make("li", "", `${name} ${points ?? "?"} of ${outOf ?? "?"}: ${why}`);
  }

  // The first verdict is on (system, baseline) as a and b, the second on the same answers turned round.
  function ruling(one) {
    const result = { 1: `${one.system} beats ${one.baseline}`, 0: `${one.baseline} beats ${one.system}` }[one.value] ??
      (one.value === null ? `${one.system} and ${one.baseline}: no verdict that can be read` : `${one.system} and ${one.baseline} tie`);
    const orders = [[one.system, one.baseline], [one.baseline, one.system]];
    const lines = one.verdicts.map(([outcome, reason], i) => {
      const [a, b] = orders[i] ?? ["a", "b"];
      const chose = { a, b }[outcome] ?? outcome;
      return make("li", "", `${a} shown first: ${chose}${reason ? `. ${reason}` : ""}`);
    });
    return [make("li", "", `${one.judge}: ${result}${one.agreed ? "" : " (the two orders disagree)"}`, make("ul", "", ...lines))];
  }
})();

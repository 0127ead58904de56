"use strict";
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const columns = read("report-data");
  const specs = read("report-specs");
  const config = read("report-config");
  const cache = {};

  // Rows are stored as columns, which is smaller.
  function rowsOf(name) {
    if (!cache[name]) {
      const fields = Object.keys(columns[name]);
      const count = fields.length ? columns[name][fields[0]].length : 0;
      cache[name] = Array.from({ length: count }, (_, i) =>
        Object.fromEntries(fields.map((field) => [field, columns[name][field][i]])));
    }
    return cache[name];
  }

  // ---- charts: drawn once, when first visible; the style sheet recolours them
  async function draw(box) {
    if (box.dataset.drawn || !box.clientWidth) return;
    box.dataset.drawn = "started";
    const { spec, rows } = specs[box.dataset.spec];
    const own = Object.fromEntries(rows.map((name) => [name, rowsOf(name)]));
    const options = { mode: "vega-lite", renderer: "svg", actions: false, ast: true, config, tooltip: { theme: "custom" } };
    await vegaEmbed(box, { ...spec, datasets: { ...spec.datasets, ...own } }, options);
    box.querySelectorAll("[role='graphics-symbol']:empty").forEach((marks) => marks.setAttribute("aria-hidden", "true"));
    box.dataset.drawn = "yes";
  }
  async function drawAll() {
    for (const box of document.querySelectorAll(".chart")) await draw(box);
    document.body.dataset.ready = "yes";
  }
  for (const input of document.querySelectorAll("input[name=variant]")) {
    const show = () => { if (input.checked) { document.body.dataset.shown = input.value; drawAll(); } };
    input.addEventListener("change", show);
    if (input.checked) document.body.dataset.shown = input.value;
  }
  drawAll();

  // ---- tables: sort by a heading; undefined values stay last in both directions
  function value(cell, numeric) {
    const text = cell.textContent.trim();
    if (!numeric) return text === "–" ? null : text;
    const number = parseFloat(text.replace(/^</, "").replace(/,/g, "").replace("−", "-"));
    return Number.isNaN(number) ? null : number;
  }
  const words = new Intl.Collator("en", { numeric: true });
  function sort(table, index) {
    const heads = [...table.tHead.rows[0].cells];
    const numeric = heads[index].dataset.type === "number";
    const direction = heads[index].getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
    heads.forEach((head, k) => head.setAttribute("aria-sort", k === index ? direction : "none"));
    const sign = direction === "ascending" ? 1 : -1;
    const body = table.tBodies[0];
    const entries = [...body.rows].map((row) => [value(row.cells[index], numeric), row]);
    entries.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null);
      return sign * (numeric ? a - b : words.compare(a, b));
    });
    body.append(...entries.map(([, row]) => row));
    if (table.closest("#class-scroll")) filter();
  }
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, index) => {
      head.querySelector("button").addEventListener("click", () => sort(table, index));
      if (head.dataset.type !== "number") return;
      for (const row of table.tBodies[0].rows) row.cells[index].classList.add("number");
    });
  }

  // ---- the class table's filter; of many classes a page at a time is laid out
  const PAGE = 500;
  const find = document.getElementById("find");
  const group = document.getElementById("group");
  const shown = document.getElementById("shown");
  const more = document.getElementById("more");
  const entries = document.querySelector("#class-scroll tbody");
  const texts = new Map();
  const note = (row) => texts.set(row, row.textContent.toLowerCase());
  [...entries.rows].forEach(note);

  // Of very many classes all but the first lie in the page as texts: they become rows when the table is first opened.
  const rest = document.getElementById("class-rest") ? read("class-rest") : { cells: [[]], fields: [], anchors: {} };
  const total = texts.size + rest.cells[0].length;
  function complete() {
    if (texts.size === total) return;
    const heads = [...entries.closest("table").tHead.rows[0].cells];
    for (let k = 0; k < rest.cells[0].length; k += 1) {
      const row = entries.insertRow();
      row.hidden = true;
      rest.fields.forEach((field, index) => {
        const cell = row.insertCell();
        const text = rest.cells[index][k];
        let inner = cell;
        if (field === "name" && rest.anchors[k]) {
          inner = cell.appendChild(document.createElement("a"));
          inner.href = `#${rest.anchors[k]}`;
        } else if (field === "group" && text !== "–") {
          row.dataset.group = text;
          inner = cell.appendChild(document.createElement("span"));
          inner.className = `group ${text}`;
        }
        inner.textContent = text;
        if (heads[index].dataset.type === "number") cell.classList.add("number");
      });
      note(row);
    }
  }
  entries.closest("details.part")?.addEventListener("toggle", () => { complete(); filter(); });

  let limit = PAGE;
  function filter() {
    const wanted = find.value.trim().toLowerCase();
    const only = group ? group.value : "";
    let count = 0;
    for (const row of entries.rows) {
      const keep = texts.get(row).includes(wanted) && (!only || row.dataset.group === only);
      count += keep;
      row.hidden = !keep || count > limit;
    }
    const found = texts.size < total ? `${total} classes` : count === total ? `${count} classes` : `${count} of ${total} classes`;
    shown.textContent = count > limit ? `${found}, the first ${limit} shown` : found;
    more.hidden = count <= limit;
  }
  find.addEventListener("input", filter);
  if (group) group.addEventListener("change", filter);
  more.addEventListener("click", () => { limit += PAGE; filter(); });
  filter();

  // ---- a link into a fold opens it, and the folds around it
  function unfold(hash) {
    const target = document.getElementById(decodeURIComponent(hash.slice(1)));
    if (!target) return;
    const own = target.matches("details") ? target : target.querySelector(":scope > details.part");
    for (let fold = own || target.closest("details"); fold; fold = fold.parentElement.closest("details")) fold.open = true;
    if (own || target.closest("details")) target.scrollIntoView();
  }
  addEventListener("hashchange", () => unfold(location.hash));
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a[href^='#']");
    if (link) unfold(link.hash);
  });
  for (const fold of document.querySelectorAll("details.part")) fold.addEventListener("toggle", drawAll);
  unfold(location.hash);

  // ---- paper shows what a click would
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details:not([open]):not(.fold)")];
    closed.forEach((entry) => { entry.open = true; });
  });
  addEventListener("afterprint", () => closed.forEach((entry) => { entry.open = false; }));
})();

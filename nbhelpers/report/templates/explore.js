(() => {
  "use strict";
  const number = (text) => parseFloat(text.replace(/[^\d.+-]*/, "").replace(/,/g, ""));

  const LONG = 50;  // rows of a table

  // Tables: a click on a heading sorts, a link saves the table as CSV.
  for (const table of document.querySelectorAll(".scroll > table")) {
    const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];

    // Of a long one the first rows, or those that are searched for.
    const bar = document.createElement("form");
    const fold = () => {
      const words = bar.find?.value.toLowerCase().split(/\s+/).filter(Boolean) ?? [];
      let count = 0;
      for (const row of body.rows) {
        const found = words.every((word) => row.textContent.toLowerCase().includes(word));
        row.hidden = !found || (++count > LONG && bar.find && !bar.all.checked);
      }
      if (bar.find) bar.querySelector("output").textContent = `${bar.all.checked ? count : Math.min(count, LONG)} of ${body.rows.length} rows`;
    };
    if (body.rows.length > LONG) {
      const name = table.parentNode.getAttribute("aria-label") || "the table";
      bar.setAttribute("aria-label", `Find in: ${name}`);
      bar.innerHTML = '<label>Find <input type="search" name="find" size="14"></label>'
        + '<label><input type="checkbox" name="all"> all rows</label> <output aria-live="polite"></output>';
      bar.oninput = fold;
      bar.onsubmit = (event) => event.preventDefault();
      table.parentNode.before(bar);
      fold();
    }
    if (body.rows.length > 1) heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.onclick = () => {
        const value = (row) => row.cells[column]?.textContent.trim() ?? "";
        const rows = [...body.rows], numeric = rows.some((row) => /^[$+\-−]?\d/.test(value(row)));
        const [first, second] = numeric ? ["descending", "ascending"] : ["ascending", "descending"];
        const way = head.getAttribute("aria-sort") === first ? second : first, sign = way === "ascending" ? 1 : -1;
        rows.sort((a, b) => {
          if (!numeric) return sign * value(a).localeCompare(value(b));
          const [x, y] = [number(value(a)), number(value(b))];
          return isNaN(x) ? 1 : isNaN(y) ? -1 : sign * (x - y);
        });
        body.append(...rows);
        fold();
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", way);
      };
    });
    const link = document.createElement("a");
    link.textContent = "Save as CSV";
    link.className = "csv";
    link.href = "#";
    link.onclick = (event) => {
      event.preventDefault();
      // A spreadsheet may run a cell that begins as a formula does (OWASP, CSV injection); figures are none.
      const safe = (said) => (/^[=+\-@\t＝＋－＠]/.test(said) && !/^[+\-\d.,\s[\]]+$/.test(said) ? `'${said}` : said);
      const quote = (cell) => `"${safe(cell.textContent.trim().replace(/\s+/g, " ")).replace(/"/g, '""')}"`;
      const lines = [...table.rows].map((row) => [...row.cells].map(quote).join(","));
      const save = document.createElement("a");
      save.href = URL.createObjectURL(new Blob(["\ufeff" + lines.join("\r\n")], { type: "text/csv" }));
      save.download = `${table.parentNode.getAttribute("aria-label") || "table"}.csv`;
      save.click();
    };
    table.parentNode.after(link);
  }

  // Escape closes what a click has opened.
  document.onkeydown = (event) => {
    const opened = event.key === "Escape" && event.target.closest("details[open]");
    if (opened) {
      opened.open = false;
      opened.querySelector("summary").focus();
    }
  };

  // Marks: what each is, for who cannot see the line.
  const marks = document.getElementById("marks"), said = (mark) => `p mark.${mark.className}`;
  if (marks) marks.onchange = () => {
    for (const mark of document.querySelectorAll(".items mark")) mark.title = document.querySelector(said(mark)).textContent;
  };

  // Texts: search, filter, order.
  const form = document.getElementById("explore");
  if (!form) return;
  const items = [...document.querySelectorAll("article.item")], list = items[0]?.parentNode;
  const text = new Map(items.map((item) => [item, item.textContent.toLowerCase()]));
  const orders = {
    gap: (a, b) => b.dataset.gap - a.dataset.gap,
    place: (a, b) => a.dataset.place - b.dataset.place,
    low: (a, b) => a.dataset.low - b.dataset.low,
    off: (a, b) => b.dataset.off - a.dataset.off,
  };
  let order;  // that the page has
  const apply = () => {
    const wanted = Object.fromEntries(new FormData(form));
    const words = wanted.find.toLowerCase().split(/\s+/).filter(Boolean);
    const [from, to] = [wanted.from, wanted.to].map((end) => (end === "" ? null : Number(end)));
    let count = 0;
    for (const item of items) {
      let any = false;
      for (const answer of item.querySelectorAll(".answer")) {
        const scores = answer.dataset.scores.split(" ").filter(Boolean).map(Number);
        const kept = (!wanted.model || answer.dataset.model === wanted.model)
          && (!wanted.failed || "failed" in answer.dataset)
          && ((from === null && to === null) || scores.some((s) => (from === null || s >= from) && (to === null || s <= to)));
        answer.hidden = !kept;
        any ||= kept;
      }
      const groups = JSON.parse(item.dataset.groups);
      item.hidden = !any || (wanted.group && !groups.includes(wanted.group))
        || !words.every((word) => text.get(item).includes(word));
      count += !item.hidden;
    }
    if (order !== (order = wanted.order)) list?.append(...[...items].sort(orders[order]));
    form.querySelector("output").textContent = `${count} of ${items.length} prompts`;
  };
  form.hidden = false;
  form.oninput = apply;
  form.onsubmit = (event) => event.preventDefault();
  form.onreset = () => setTimeout(apply);
  apply();
})();

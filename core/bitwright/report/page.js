document.querySelectorAll("table").forEach((table) => {
  const body = table.tBodies[0], rows = [...body.rows];
  const value = (row, i) => { const c = row.cells[i]; return c.dataset.v === undefined ? c.textContent : Number(c.dataset.v); };
  [...table.tHead.rows[0].cells].forEach((head, i) => {
    const button = document.createElement("button");
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      [...table.tHead.rows[0].cells].forEach((h) => h.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      rows.sort((a, b) => {
        const x = value(a, i), y = value(b, i);
        const order = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y), undefined, { numeric: true });
        return down ? -order : order;
      });
      body.append(...rows);
    });
  });
  if (rows.length > 20) {
    const box = document.createElement("input");
    box.type = "search"; box.placeholder = "Filter rows"; box.setAttribute("aria-label", "Filter rows");
    box.addEventListener("input", () => {
      const wanted = box.value.toLowerCase();
      rows.forEach((r) => { r.hidden = !r.textContent.toLowerCase().includes(wanted); });
    });
    table.parentElement.before(box);
  }
});

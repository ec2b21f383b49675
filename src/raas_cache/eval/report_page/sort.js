// A click on the head of a column sorts the table by this column, and a second click reverses the order.
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    const compare = (a, b) => "value" in a.dataset
      ? Number(a.dataset.value) - Number(b.dataset.value) || 0  // two infinite budgets are equal
      : a.textContent.localeCompare(b.textContent);
    const rows = [...table.tBodies[0].rows];
    rows.sort((a, b) => sign * compare(a.cells[column], b.cells[column]));
    table.tBodies[0].append(...rows);
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
  }));
}

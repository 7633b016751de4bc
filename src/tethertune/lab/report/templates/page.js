// Draws every chart in the colours of the page's scheme, again when the scheme changes, and adds the buttons that save
// a chart as SVG and a table as CSV; bundled with vegaEmbed.
(() => {
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const views = new Map();

  const theme = (colour) => ({
    background: colour("--surface"), // what is behind it in the page, so that a saved chart has it too
    font: "system-ui, sans-serif",
    view: { stroke: null },
    axis: {
      labelColor: colour("--muted"),
      titleColor: colour("--muted"),
      gridColor: colour("--line"),
      domainColor: colour("--line"),
      tickColor: colour("--line"),
      labelFontSize: 11,
      titleFontSize: 12,
      titleFontWeight: "normal",
      titlePadding: 8,
    },
    axisX: { labelFlush: false, labelOverlap: "greedy", labelSeparation: 8 },
    axisY: { domain: false, ticks: false, labelPadding: 6 },
  });

  const draw = async (figure) => {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    const source = figure.querySelector("script").textContent;
    const spec = JSON.parse(source.replace(/var\((--[a-z0-9-]+)\)/g, (whole, name) => colour(name) || whole));
    const options = { config: theme(colour), renderer: "svg", actions: false, defaultStyle: false };
    options.tooltip = { disableDefaultStyle: true };
    views.get(figure)?.finalize();
    views.set(figure, await vegaEmbed(figure.querySelector(".chart"), spec, options));
    const pressed = figure.closest(".figure").querySelector("[aria-pressed=true]");
    if (pressed) choose(figure, pressed.dataset.series);
  };

  const choose = (figure, series) => views.get(figure)?.view.signal("chosen", series).runAsync();

  const drawAll = () => Promise.all([...document.querySelectorAll("figure")].map(draw)).catch(console.error);

  for (const legend of document.querySelectorAll(".legend")) {
    const figures = legend.parentElement.querySelectorAll("figure");
    legend.addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (!button) return;
      const chosen = button.getAttribute("aria-pressed") === "true" ? "" : button.dataset.series;
      for (const other of legend.children) other.setAttribute("aria-pressed", String(other.dataset.series === chosen));
      for (const figure of figures) choose(figure, chosen);
    });
  }

  const save = (name, type, text) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  };

  const fileName = (...words) =>
    words.join(" ").normalize("NFKD").replace(/[^\w.]+/g, "-").replace(/^-+|-+$/g, "").toLowerCase();

  const csv = (table) =>
    [...table.rows]
      .map((row) => [...row.cells].map((cell) => field(cell.textContent.trim())).join(","))
      .join("\r\n") + "\r\n";

  // Other programs read a hyphen as a minus sign, and quotes around what holds a comma, a quote or a line's end.
  const field = (text) => {
    const plain = text.replace(/\u2212/g, "-");
    return /[",\r\n]/.test(plain) ? `"${plain.replace(/"/g, '""')}"` : plain;
  };

  const titleOf = (element) => element.closest(".comparison")?.querySelector("h2").dataset.title ?? "";

  const addButton = (place, label, what, act) => {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "save";
    button.textContent = label;
    button.setAttribute("aria-label", `${label}: ${what}`);
    button.addEventListener("click", () => Promise.resolve(act()).catch(console.error));
    place.append(button);
  };

  for (const figure of document.querySelectorAll("figure")) {
    const what = figure.querySelector("figcaption").textContent.trim();
    const name = `${fileName(titleOf(figure), figure.closest(".figure").querySelector("h3").textContent, what)}.svg`;
    addButton(figure, "Save SVG", what, async () => save(name, "image/svg+xml", await views.get(figure).view.toSVG()));
  }

  for (const table of document.querySelectorAll("table")) {
    const what = table.caption.textContent.trim();
    const name = `${fileName(titleOf(table), what)}.csv`;
    const place = document.createElement("p");
    place.className = "saves";
    table.closest(".scroll").after(place);
    addButton(place, "Save CSV", what, () => save(name, "text/csv", csv(table)));
  }

  dark.addEventListener("change", drawAll);
  drawAll();
})();

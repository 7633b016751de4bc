// Draws every chart in the colours of the page's scheme, again when the scheme changes; bundled with vegaEmbed.
(() => {
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const views = new Map();

  const theme = (colour) => ({
    background: "transparent",
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

  dark.addEventListener("change", drawAll);
  drawAll();
})();

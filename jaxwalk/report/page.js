(() => {
  "use strict";
  const specs = JSON.parse(document.getElementById("figures").textContent);
  const night = matchMedia("(prefers-color-scheme: dark)");
  const touch = matchMedia("(pointer: coarse)").matches;
  const webgl = (() => {
    try {
      const context = document.createElement("canvas").getContext("webgl");
      context.getExtension("WEBGL_lose_context")?.loseContext();
      return true;
    } catch { return false; }
  })();
  const drawn = new Map();
  const lighter = (colour) => "#" + [1, 3, 5].map((k) =>
    Math.round(90 + parseInt(colour.slice(k, k + 2), 16) * 165 / 255).toString(16)).join("");

  function draw(place) {
    const width = place.clientWidth;
    if (!width) return;
    const spec = specs[place.dataset.figure], narrow = width < 560;
    const layout = structuredClone(narrow ? spec.narrow : spec.wide);
    const { columns, rows, aspect, height, bare, gap, between, cells } = layout.meta;
    const style = getComputedStyle(document.documentElement);
    const ink = style.getPropertyValue("--ink").trim(), card = style.getPropertyValue("--card").trim();
    const soft = style.getPropertyValue("--soft").trim(), edge = style.getPropertyValue("--edge").trim();
    layout.width = width;
    const panel = (width - 20 - (bare ? 0 : 60)) * (1 - gap * (columns - 1)) / columns;
    const tall = aspect ? Math.min(panel * aspect, 560) : height;
    layout.height = Math.round(tall * (rows + (rows - 1) * between) + (bare ? 8 : 50) + layout.margin.t);
    layout.font = { family: getComputedStyle(document.body).fontFamily, size: 12.5, color: soft };
    layout.modebar = { bgcolor: "rgba(0,0,0,0)", color: soft, activecolor: ink };
    layout.hoverlabel = { bgcolor: card, bordercolor: edge, font: { color: ink }, align: "left" };
    layout.legend.font = { color: ink, size: 12.5 };
    layout.annotations.forEach((a) => { a.font.color = ink; });
    layout.dragmode = touch ? false : "zoom";
    const data = spec.data.map((trace) => {
      const t = { ...trace };
      if (t.type === "scattergl" && !webgl) t.type = "scatter";
      if (t.texttemplate && width - 130 < cells) delete t.texttemplate;
      // The points' own colours are made for a white page: on a dark one pure blue would be lost.
      if (night.matches && Array.isArray(t.marker?.color) && typeof t.marker.color[0] === "string")
        t.marker = { ...t.marker, color: t.marker.color.map(lighter) };
      return t;
    });
    drawn.set(place, width);
    Plotly.react(place, data, layout, { displaylogo: false, displayModeBar: touch || narrow ? false : "hover",
      // Named one by one: by default there is one that sends the figure to plotly's cloud.
      modeBarButtons: [["zoom2d", "pan2d", "resetScale2d", "toImage"]], plotlyServerURL: "", scrollZoom: false,
      responsive: false,
      toImageButtonOptions: { filename: place.dataset.file, scale: 2 }, doubleClick: "reset" })
      .catch((error) => { place.textContent = "This figure could not be drawn here: " + error; });
  }

  const places = [...document.querySelectorAll(".plot")];
  const near = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) { near.unobserve(entry.target); draw(entry.target); }
  }, { rootMargin: "600px" });
  places.forEach((place) => near.observe(place));
  let waiting;
  const resized = new ResizeObserver(() => {
    clearTimeout(waiting);
    waiting = setTimeout(() => drawn.forEach((width, place) => { if (place.clientWidth !== width) draw(place); }), 120);
  });
  places.forEach((place) => resized.observe(place));
  night.addEventListener("change", () => drawn.forEach((_, place) => draw(place)));
  addEventListener("beforeprint", () => places.forEach(draw));
})();

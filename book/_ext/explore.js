// Figures of the published book: the sliders of figures.explore, the height of figures.images.

// On a narrow page images are small, and so is the figure that holds them.
function fitted(id, layout) {
  const { height, frame, aspect } = layout.meta ?? {};
  if (!aspect) return layout;
  const figure = document.getElementById(id);
  // what the row labels leave of it, once it is drawn
  const width = figure._fullLayout?._size?.w ?? figure.clientWidth - 24;
  return { ...layout, height: Math.min(height, Math.round(width * aspect) + frame) };
}

function explore(id, figures) {
  const inputs = [...document.querySelectorAll(`#${id}-controls input`)];
  const shared = structuredClone(document.getElementById(id).layout);
  const draw = () => {
    for (const input of inputs) {
      const text = JSON.parse(input.dataset.values)[input.value];
      input.nextElementSibling.value = text;
      input.setAttribute("aria-valuetext", text);
    }
    const { data, layout } = figures[inputs.map((input) => input.value).join(",")];
    // Plotly writes into what it is given
    Plotly.react(id, structuredClone(data), fitted(id, structuredClone(layout ?? shared)));
  };
  for (const input of inputs) input.addEventListener("input", draw);
}

for (const event of ["load", "resize"]) {
  addEventListener(event, () => {
    for (const figure of document.querySelectorAll(".js-plotly-plot")) {
      const { height } = fitted(figure.id, figure.layout);
      if (height === figure.layout.height) continue;
      figure.style.height = `${height}px`;
      figure.parentElement.style.height = "auto"; // Plotly's wrapper has the height of a wide page
      Plotly.relayout(figure, { height });
    }
  });
}

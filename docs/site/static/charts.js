// Draws the page's charts and hands them what its controls say.
document.addEventListener("DOMContentLoaded", async () => {
  const form = document.querySelector(".chart-controls");
  const places = [...document.querySelectorAll(".chart")];
  const chosen = () => {
    const given = new FormData(form);
    return { size: given.get("size"), networks: given.getAll("networks"), kinds: given.getAll("kinds") };
  };
  const views = await Promise.all(places.map(async (place) => {
    const spec = JSON.parse(place.nextElementSibling.textContent);
    const drawn = await vegaEmbed(place, spec, { renderer: "svg", actions: false, logLevel: 1 });
    return drawn.view;
  }));
  const show = () => {
    for (const view of views) {
      for (const [name, value] of Object.entries(chosen())) view.signal(name, value);
      view.runAsync();
    }
  };
  form.addEventListener("change", show);
  for (const button of form.querySelectorAll("button")) {
    button.addEventListener("click", () => {
      for (const box of form.elements.networks) box.checked = button.textContent === "all";
      show();
    });
  }
  show();
});

"use strict";
for (const figure of document.querySelectorAll(".picture")) {
  const stage = figure.querySelector(".stage");
  const slider = figure.querySelector("input");
  const buttons = figure.querySelectorAll("button");

  const view = (name) => {
    stage.dataset.view = name;
    for (const button of buttons) {
      button.setAttribute("aria-pressed", String(button.dataset.view === name));
    }
    if (slider) slider.disabled = name !== "slider";
  };
  const cut = (percent) => stage.style.setProperty("--cut", `${percent}%`);

  for (const button of buttons) {
    button.addEventListener("click", () => view(button.dataset.view));
  }
  if (!slider) continue;
  slider.addEventListener("input", () => cut(slider.value));
  const drag = (event) => {
    if (stage.dataset.view !== "slider") return;
    const box = stage.getBoundingClientRect();
    const share = (event.clientX - box.left) / box.width;
    slider.value = String(Math.round(100 * Math.min(1, Math.max(0, share))));
    cut(slider.value);
  };
  stage.addEventListener("pointerdown", (event) => {
    stage.setPointerCapture(event.pointerId);
    drag(event);
  });
  stage.addEventListener("pointermove", (event) => {
    if (event.buttons) drag(event);
  });
}

// Without this script the first and the last sheet are shown; with it, any of them.
document.querySelectorAll(".overtime").forEach(function (box) {
  var sheets = box.querySelectorAll("figure");
  var slider = box.querySelector("input");
  function show() {
    sheets.forEach(function (sheet, i) { sheet.hidden = i !== Number(slider.value); });
  }
  box.classList.add("live");
  slider.value = sheets.length - 1;
  slider.addEventListener("input", show);
  show();
});

for (const button of document.querySelectorAll(".copy")) {
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(button.previousElementSibling.textContent);
    button.textContent = "copied";
    setTimeout(() => { button.textContent = "copy"; }, 1500);
  });
}

// One picture at a time, the reference on the left of the divider, the chosen variant on the right of it.
const compare = document.querySelector(".compare");
if (compare) {
  const frame = compare.querySelector(".frame");
  const [under, over] = frame.querySelectorAll("img");
  const [left, right] = frame.querySelectorAll("span");
  const range = frame.querySelector("input");
  const prompt = compare.querySelector("select");
  const cells = [...document.querySelectorAll(".pictures button")];
  const find = (row, column) => cells.find((cell) => cell.dataset.row === row && cell.dataset.column === column);
  const wipe = () => {
    frame.style.setProperty("--at", `${range.value}%`);
    left.style.opacity = range.value < 12 ? 0 : 1;
    right.style.opacity = range.value > 88 ? 0 : 1;
    range.setAttribute("aria-valuetext", `${range.value} % ${left.textContent}, the rest ${right.textContent}`);
  };
  const show = () => {
    const chosen = compare.querySelector("input[type=radio]:checked");
    const [before, after] = [find(prompt.value, "0"), find(prompt.value, chosen.value)];
    for (const [image, cell] of [[under, before], [over, after]]) {
      image.src = cell.firstElementChild.src;
      image.alt = cell.firstElementChild.alt;
    }
    left.textContent = before.dataset.name;
    right.textContent = after.dataset.name;
    for (const cell of cells) cell.setAttribute("aria-pressed", cell === before || cell === after);
    wipe();
  };
  under.addEventListener("load", () => frame.style.setProperty("--shape", under.naturalWidth / under.naturalHeight));
  range.addEventListener("input", wipe);
  compare.addEventListener("change", (event) => { if (event.target !== range) show(); });
  for (const cell of cells) {
    cell.addEventListener("click", () => {
      prompt.value = cell.dataset.row;
      const radio = compare.querySelector(`input[type=radio][value="${cell.dataset.column}"]`);
      if (radio) radio.checked = true;
      show();
      frame.scrollIntoView({ block: "nearest" });
    });
  }
  compare.hidden = false;
  show();
}

const pick = document.querySelector(".pick select");
if (pick) {
  const plots = [...document.querySelectorAll(".pareto")];
  const choose = () => plots.forEach((plot, k) => { plot.hidden = String(k) !== pick.value; });
  pick.addEventListener("change", choose);
  pick.parentElement.hidden = false;
  choose();
}

addEventListener("beforeprint", () => { for (const part of document.querySelectorAll("details")) part.open = true; });

"use strict";
// Comfort only: the page is whole without it. Switches work by style alone; here they are remembered.
const root = document.documentElement;
const remember = (name, value) => { try { localStorage.setItem("stage-report-" + name, value); } catch { /* private */ } };
const recall = (name) => { try { return localStorage.getItem("stage-report-" + name); } catch { return null; } };
const choose = (id) => { const input = document.getElementById(id); if (input) input.checked = true; };

function apply() {
  const language = document.querySelector("input[name=language]:checked").value;
  root.lang = language === "zh" ? "zh-CN" : "en";
  document.title = language === "zh" ? root.dataset.titleZh : root.dataset.titleEn;
}

const browser = (navigator.language || "en").toLowerCase().startsWith("zh") ? "zh" : "en";
const wanted = recall("language") || (root.dataset.language === "auto" ? browser : root.dataset.language);
choose("language-" + (wanted === "zh" ? "zh" : "en"));
choose("theme-" + (recall("theme") || "auto"));
apply();
document.addEventListener("change", ({ target }) => {
  if (target.name === "language" || target.name === "theme") { remember(target.name, target.value); apply(); }
});

for (const button of document.querySelectorAll(".command button")) {
  const code = button.parentElement.querySelector("code");
  button.hidden = false;
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(code.textContent.trim());
    } catch {
      getSelection().selectAllChildren(code);
      document.execCommand("copy");
    }
    button.classList.add("copied");
    setTimeout(() => button.classList.remove("copied"), 1500);
  });
}

const tooltip = document.getElementById("tooltip");
function tell({ target }) {
  const holder = target.closest?.("[data-tip], :has(> .tip)");
  tooltip.hidden = !holder;
  if (!holder) return;
  const tip = holder.querySelector(":scope > .tip");
  tooltip.replaceChildren(...(tip ? [...tip.cloneNode(true).childNodes] : [holder.dataset.tip]));
  const box = holder.getBoundingClientRect(), own = tooltip.getBoundingClientRect();
  const left = box.left + box.width / 2 - own.width / 2;
  tooltip.style.left = Math.max(8, Math.min(left, root.clientWidth - own.width - 8)) + "px";
  tooltip.style.top = (box.top > own.height + 12 ? box.top - own.height - 8 : box.bottom + 8) + "px";
}
document.addEventListener("mouseover", tell);
document.addEventListener("focusin", tell);
document.addEventListener("scroll", () => { tooltip.hidden = true; }, true);

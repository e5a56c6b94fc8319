const root = document.documentElement;
const system = matchMedia("(prefers-color-scheme: dark)");
const button = document.getElementById("theme");
const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
const label = () => { button.lastElementChild.textContent = isDark() ? "Light" : "Dark"; button.setAttribute("aria-label", `Use the ${isDark() ? "light" : "dark"} theme`); };
button.hidden = false;
button.addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  try { localStorage.setItem("decapod-theme", root.dataset.theme); } catch { /* as above: not kept */ }
  label();
});
system.addEventListener("change", label);
label();

const announce = document.getElementById("announce");
async function copy(text) {
  if (navigator.clipboard && isSecureContext) return navigator.clipboard.writeText(text);
  const area = document.createElement("textarea");
  area.value = text;
  area.className = "hidden";
  document.body.append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  if (!copied) throw new Error("the browser refused");
}
for (const one of document.querySelectorAll("button[data-copy]")) {
  one.hidden = false;
  one.addEventListener("click", async () => {
    let said = "Copied";
    try { await copy(one.dataset.copy); } catch { said = "Not copied"; }
    one.textContent = said;
    announce.textContent = said;
    one.focus();
    setTimeout(() => { one.textContent = "Copy"; announce.textContent = ""; }, 1600);
  });
}
addEventListener("beforeprint", () => { for (const box of document.querySelectorAll("details")) box.open = true; });

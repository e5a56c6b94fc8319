// Before the first paint, so that a chosen theme never flashes the other one.
try {
  const theme = localStorage.getItem("decapod-theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch { /* a browser may refuse storage to a local file; the system's theme is used then */ }

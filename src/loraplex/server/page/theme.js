// Runs before the first paint, so that a chosen theme doesn't flash.
(() => {
  const theme = localStorage.getItem("loraplex-theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
})();

// Gradio's frames for pictures show their label and do not say it: this gives each of them its name, and the name that
// an empty one has already a role to go with it.
() => {
  const name = () => {
    for (const label of document.querySelectorAll('.block > [data-testid="block-label"]')) {
      const block = label.parentElement;
      const text = label.textContent.trim();
      if (block.getAttribute('aria-label') !== text) {
        block.setAttribute('role', 'group');
        block.setAttribute('aria-label', text);
      }
      for (const empty of block.querySelectorAll('.empty[aria-label]:not([role])')) empty.setAttribute('role', 'img');
      for (const image of block.querySelectorAll('.image-frame img[alt=""]')) image.alt = text;
    }
  };
  let waiting = 0;
  new MutationObserver(() => {
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(name);
  }).observe(document.body, {childList: true, subtree: true, characterData: true});
  name();
}

// The demo page: a photo by drop, file or camera, and a prompt -> POST /caption -> the card of its
// captions.
"use strict";
{
  const at = (id) => document.getElementById(id);
  const video = at("video"), viewfinder = at("viewfinder"), result = at("result");
  let asked = 0, latest = null;

  const say = (status, error = "") => {
    at("status").textContent = status;
    at("error").textContent = error;
  };

  const caption = async (photo) => {
    const number = ++asked, prompt = at("prompt").value.trim();
    latest = photo;
    result.replaceChildren();
    if (photo.size > Number(result.dataset.limit)) {
      say("", `The photo has more than ${result.dataset.limit / 2 ** 20} MiB; make it smaller.`);
      return;
    }
    say("Looking at the photo …");
    result.setAttribute("aria-busy", "true");
    let status, text;
    try {
      const address = "/caption" + location.search;
      const answer = await fetch(prompt ? `${address}&prompt=${encodeURIComponent(prompt)}` : address, {
        method: "POST", body: photo,
      });
      [status, text] = [answer.status, await answer.text()];
    } catch {
      [status, text] = [0, "The page's own server has ended; start it again with make web."];
    }
    if (number !== asked) return; // a newer photo is on its way
    result.removeAttribute("aria-busy");
    if (status !== 200) {
      say("", text);
      return;
    }
    result.innerHTML = text;
    say(`Caption: ${result.querySelector(".card").dataset.caption}`);
  };

  at("file").addEventListener("change", (event) => {
    const [photo] = event.target.files;
    event.target.value = ""; // the same file may be chosen again
    if (photo) caption(photo);
  });

  // The same photo with other words.
  at("prompt").addEventListener("change", () => {
    if (latest) caption(latest);
  });

  for (const name of ["dragover", "dragleave", "drop"]) {
    document.addEventListener(name, (event) => {
      event.preventDefault();
      document.body.classList.toggle("over", name === "dragover");
      if (name !== "drop") return;
      const [photo] = event.dataTransfer.files;
      if (photo) caption(photo);
      else say("", "That was no file; save the picture first, and drop its file.");
    });
  }

  const closeCamera = () => {
    video.srcObject?.getTracks().forEach((track) => track.stop());
    video.srcObject = null;
    viewfinder.hidden = true;
    at("camera").focus();
  };

  at("camera").addEventListener("click", async () => {
    try {
      video.srcObject = await navigator.mediaDevices.getUserMedia({
        video: { facingMode: "environment" },
      });
    } catch (error) {
      const denied = error.name === "NotAllowedError";
      say("", denied ? "The browser was not allowed to use the camera." : "No camera is found.");
      return;
    }
    say("");
    viewfinder.hidden = false;
    at("shoot").focus();
  });

  at("shoot").addEventListener("click", () => {
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
    canvas.getContext("2d").drawImage(video, 0, 0);
    canvas.toBlob((photo) => {
      closeCamera();
      if (photo) caption(photo);
      else say("", "The camera shows nothing yet; try again.");
    }, "image/jpeg", 0.95);
  });

  at("close").addEventListener("click", closeCamera);
}

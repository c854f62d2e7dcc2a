// The demo page: sends a photo (dropped, chosen or taken by the camera) and a prompt to /caption and
// shows the card that it returns.
"use strict";
{
  const at = (id) => document.getElementById(id);
  const video = at("video"), viewfinder = at("viewfinder"), result = at("result");
  let requests = 0, latest = null;

  const showStatus = (status, error = "") => {
    at("status").textContent = status;
    at("error").textContent = error;
  };

  const caption = async (photo) => {
    const number = ++requests, prompt = at("prompt").value.trim();
    latest = photo;
    result.replaceChildren();
    if (photo.size > Number(result.dataset.limit)) {
      showStatus("", `The photo has more than ${result.dataset.limit / 2 ** 20} MiB; make it smaller.`);
      return;
    }
    showStatus("Looking at the photo …");
    result.setAttribute("aria-busy", "true");
    let status, text;
    try {
      const address = "/caption" + location.search;
      const answer = await fetch(prompt ? `${address}&prompt=${encodeURIComponent(prompt)}` : address, {
        method: "POST", body: photo,
      });
      [status, text] = [answer.status, await answer.text()];
    } catch {
      [status, text] = [0, "The server of this page has ended; start it again with make web."];
    }
    if (number !== requests) return; // a newer request has been sent
    result.removeAttribute("aria-busy");
    if (status !== 200) {
      showStatus("", text);
      return;
    }
    result.innerHTML = text;
    showStatus(`Caption: ${result.querySelector(".card").dataset.caption}`);
  };

  at("file").addEventListener("change", (event) => {
    const [photo] = event.target.files;
    event.target.value = ""; // the same file may be chosen again
    if (photo) caption(photo);
  });

  // Caption the same photo with another prompt.
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
      else showStatus("", "This is not a file; save the picture first, then drop its file.");
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
      showStatus("", denied ? "The browser may not use the camera." : "No camera was found.");
      return;
    }
    showStatus("");
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
      else showStatus("", "The camera shows nothing yet; try again.");
    }, "image/jpeg", 0.95);
  });

  at("close").addEventListener("click", closeCamera);
}

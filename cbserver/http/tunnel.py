"""A public address for a local port, through ngrok."""
import os


def ngrok_token():
    """The ngrok token from NGROK_AUTHTOKEN or Colab's secrets, or None."""
    token = os.environ.get("NGROK_AUTHTOKEN")
    if token:
        return token
    try:
        from google.colab import userdata

        return userdata.get("NGROK_AUTHTOKEN")
    except Exception:  # not on Colab, no such secret, or no access to it
        return None


def open_tunnel(port, token):
    """The public URL of a tunnel to a local port, or None with one sentence that says why."""
    if not token:
        print("No ngrok token, so no tunnel: set the environment variable NGROK_AUTHTOKEN (free at "
              "ngrok.com). On Colab a secret of that name will do in a cell; a line with ! never "
              "sees it, and lesson.start(engine=…, tunnel=True) hands it on.")
        return None
    from pyngrok import conf, ngrok
    from pyngrok.exception import PyngrokError

    try:
        config = conf.PyngrokConfig(auth_token=token)
        url = ngrok.connect(port, pyngrok_config=config).public_url
    except (PyngrokError, OSError) as error:
        lines = str(error).splitlines() or [repr(error)]
        reason = getattr(error, "ngrok_error_code", None) or lines[0]
        print(f"No tunnel ({reason}): check the token, the network, and that ngrok may write to "
              "your home; the server stays on localhost.")
        return None
    print("In a browser the free plan of ngrok shows a page first: press Visit Site once.")
    return url

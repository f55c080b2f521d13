"""The end of a server."""

import threading
import time


def test_sigterm_lets_requests_finish(server, photos):
    answers = []
    client = threading.Thread(target=lambda: answers.append(server.post("/search", photos.files[0].read_bytes())))
    # A connection without a request does not keep the server from stopping.
    idle = server.connect()
    client.start()
    while client.is_alive() and server.metric("twoview_working") != 1:
        time.sleep(0.002)
    code, log = server.stop()
    client.join(20)
    idle.close()
    assert code == 143, log
    assert log.rstrip().endswith("twoview: SIGTERM: stopped")
    assert "Traceback" not in log
    assert answers[0][0] == 200

"""The endpoints of a running server: answers, batches, the page, and the headers of every answer."""

import csv
import json
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import pytest
import torch
from PIL import Image
from servers import form

from twoview.tools.searching import search

JPEG = {"Content-Type": "image/jpeg"}


def test_the_vector_is_that_of_the_encoder(server, photos):
    for file, expected in zip(photos.files[:3], photos.vectors, strict=False):
        status, content = server.post("/embed", file.read_bytes())
        assert status == 200
        torch.testing.assert_close(torch.tensor(content["vector"]), expected, rtol=0, atol=1e-6)


def test_neighbors_are_those_of_task_search(server, photos, tmp_path):
    query = photos.files[4]
    with search(photos.index, query, k=5, run_dir=tmp_path).open(encoding="utf-8", newline="") as file:
        expected = list(csv.DictReader(file))
    body, content_type = form(query.read_bytes(), name="../../etc/passwd")
    for image, kind in ((query.read_bytes(), "image/png"), (body, content_type), (query.read_bytes(), "")):
        status, content = server.post("/search?k=5", image, kind)
        assert status == 200
        assert [str(found["id"]) for found in content["neighbors"]] == [row["id"] for row in expected]
        for found, row in zip(content["neighbors"], expected, strict=True):
            assert found["similarity"] == pytest.approx(float(row["similarity"]), abs=1e-6)
            assert found["label"] == row["label"]
    assert content["neighbors"][0]["path"] == str(query)
    assert len(server.post("/search", query.read_bytes())[1]["neighbors"]) == 3
    everything = server.post("/search?k=1000", query.read_bytes())[1]["neighbors"]
    assert len(everything) == len(photos.files)
    assert any("\udcff" in found["path"] for found in everything)


def test_requests_at_the_same_time_are_computed_together_and_answered_apart(server, photos):
    images = [(i, file.read_bytes()) for i, file in enumerate(photos.files)] * 4
    before = [server.metric(f"twoview_batch_images_{name}") for name in ("sum", "count")]
    with ThreadPoolExecutor(6) as clients:
        answers = list(clients.map(lambda item: server.post("/embed", item[1]), images))
    for (i, _), (status, content) in zip(images, answers, strict=True):
        assert status == 200
        torch.testing.assert_close(torch.tensor(content["vector"]), photos.vectors[i], rtol=0, atol=1e-6)
    total, batches = (
        server.metric(f"twoview_batch_images_{name}") - b for name, b in zip(("sum", "count"), before, strict=True)
    )
    assert total == len(images)
    assert batches < len(images) / 2


def test_thumbnails_are_those_of_entries(server, photos):
    status, headers, content = server.request("GET", "/thumbnails/103")
    assert (status, headers["Content-Type"]) == (200, "image/jpeg")
    assert Image.open(BytesIO(content)).size == (60, 50)
    for number in (0, 110, 111, 10**15):  # no entry, a file that is gone, an image in no file, no entry
        status, _, content = server.request("GET", f"/thumbnails/{number}")
        assert status == 404
        assert str(number) in content["detail"]
    path = urllib.parse.quote(str(photos.files[0]), safe="")
    for name in ("-1", "x", "1" * 30, path, "..%2fhealth", "../../etc/passwd", "%00", f"103/{path}"):
        assert server.request("GET", f"/thumbnails/{name}")[0] in (404, 422)


@pytest.mark.parametrize("k", ["0", "-1", "1001", "x", "", "1e3", "9" * 50, "²"])
def test_a_wrong_number_of_neighbors_is_refused(k, server, photos):
    status, content = server.post(f"/search?k={urllib.parse.quote(k)}", photos.files[0].read_bytes())
    assert status == 400
    assert "give a whole number from 1 to 1000" in content["detail"]


def test_health_and_metrics(server, photos):
    status, _, content = server.request("GET", "/health")
    assert status == 200
    assert (content["status"], content["images"], content["k"]) == ("ok", len(photos.files), 3)
    server.post("/embed", b"")
    status, headers, content = server.request("GET", "/metrics")
    assert status == 200
    assert headers.get_content_type() == "text/plain"
    text = content.decode()
    assert 'twoview_requests_total{path="/embed",status="400"}' in text
    assert f"twoview_index_images {float(len(photos.files))}" in text
    assert server.metric("twoview_working") == 0
    assert server.metric("twoview_upload_bytes") == 0


def test_every_answer_has_the_headers_and_the_page_needs_no_other_server(server):
    for path in ("/", "/page.js", "/page.css", "/health", "/nothing", "/thumbnails/103"):
        _, headers, content = server.request("GET", path)
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert "Access-Control-Allow-Origin" not in headers
        assert "server" not in headers
        if path in ("/", "/page.js", "/page.css"):
            assert b"http:" not in content
            assert b"https:" not in content
            assert b"innerHTML" not in content
    assert server.request("GET", "/docs")[0] == 404
    assert server.request("GET", "/index.html")[0] == 404
    assert server.request("GET", "/search")[0] == 405


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "127.0.0.1:1"}, 200),
        ({"Host": "LOCALHOST"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Host": "evil.example"}, 421),
        ({"Host": "127.0.0.1.evil.example"}, 421),
        ({"Host": "localhost@evil.example"}, 421),
        ({"Host": "10.0.0.1"}, 421),
        ({"Host": "[::1"}, 421),
        ({"Host": ""}, 421),
        ({"Host": "localhost:5", "Origin": "http://localhost:5"}, 200),
        ({"Host": "localhost:5", "Origin": "http://localhost:6"}, 403),
        ({"Host": "localhost:5", "Origin": "https://evil.example"}, 403),
        ({"Host": "localhost:5", "Origin": "null"}, 403),
        ({"Host": "localhost:5", "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, 403),
        ({"Host": "localhost:5", "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, 200),
    ],
)
def test_pages_of_other_sites_are_refused(headers, status, server, photos):
    found, _, content = server.request("GET", "/health", headers=headers)
    assert found == status
    assert found == 200 or json.dumps(content["detail"])
    body = photos.files[0].read_bytes()
    assert server.request("POST", "/search", body, {**headers, **JPEG})[0] == status

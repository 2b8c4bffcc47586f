"""`littlebit serve` in a process of its own, asked by the `openai` client and by a browser."""

import concurrent.futures
import json
import shutil
import socket
import time
import urllib.error
import urllib.request

import littlebit.fast as lb
import pytest
from littlebit.fast.decoding.mapped_weights import map_model
from littlebit.fast.decoding.tokenizer import Tokenizer
from server import serving

openai = pytest.importorskip("openai", reason="the client of the OpenAI API is not installed: pip install openai")
pytest.importorskip("uvicorn", reason="the extra is not installed: pip install 'littlebit[serve]'")

PROMPTS = ("It was the best of times", "Four score and seven years ago", "x", "The whale, the whale!")


@pytest.fixture(scope="module")
def address(chat_model):
    with serving(chat_model, "--queue", 6, "--batch", 2, "--context", 256, "--log-requests") as (address, _):
        yield address


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def local(chat_model):
    """What `littlebit generate` writes."""
    model, tokenizer = map_model(chat_model), Tokenizer(chat_model)
    return lambda prompt, count, **more: lb.generate(model, prompt, count, tokenizer=tokenizer, **more)


def status(client, path, **body):
    with pytest.raises(openai.APIStatusError) as error:
        client.post(path, body=body, cast_to=object)
    return error.value


def scrape(address):
    with urllib.request.urlopen(f"{address}/metrics") as found:
        rows = [line.rsplit(" ", 1) for line in found.read().decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in rows}


def settled(address, name, value):
    """Wait until a metric has a value."""
    for _ in range(200):
        if scrape(address)[name] == value:
            return True
        time.sleep(0.05)
    return False


def test_texts_are_those_of_generate(client, local):
    assert [each.id for each in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    sampled = {"temperature": 0.7, "seed": 5}
    found = client.completions.create(model="tiny", prompt=list(PROMPTS), max_tokens=24, temperature=0)
    assert [each.text for each in found.choices] == [local(prompt, 24, temperature=0.0) for prompt in PROMPTS]
    found = client.completions.create(model="tiny", prompt=PROMPTS[0], max_tokens=24, **sampled)
    assert found.choices[0].text == local(PROMPTS[0], 24, **sampled)
    assert (found.usage.completion_tokens, found.choices[0].finish_reason) == (24, "length")
    chunks = client.completions.create(model="tiny", prompt=PROMPTS[0], max_tokens=24, stream=True, **sampled)
    assert "".join(chunk.choices[0].text for chunk in chunks) == found.choices[0].text


def test_chats_use_the_template(client, local):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    expected = local("[system] Be brief.\n[user] Hi\n[assistant] ", 20, temperature=0.0)
    asked = {"model": "tiny", "messages": messages, "max_completion_tokens": 20, "temperature": 0}
    found = client.chat.completions.create(**asked, n=2)
    assert [each.message.content for each in found.choices] == [expected] * 2
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(each.choices[0].delta.content or "" for each in chunks[:-1]) == expected
    assert chunks[0].choices[0].delta.role == "assistant"
    assert (chunks[-2].choices[0].finish_reason, chunks[-1].choices) == ("length", [])
    assert chunks[-1].usage.total_tokens == chunks[-1].usage.prompt_tokens + 20
    letter = expected[3]
    for stream in (False, True):
        stopped = client.chat.completions.create(**asked, stop=letter, stream=stream)
        choices = [each.choices[0] for each in stopped] if stream else stopped.choices
        text = "".join((each.delta if stream else each.message).content or "" for each in choices)
        assert (text, choices[-1].finish_reason) == (expected[: expected.index(letter)], "stop")


def test_log_probabilities_have_both_forms(client):
    asked = {"model": "tiny", "max_tokens": 4, "temperature": 0}
    found = client.completions.create(**asked, prompt="ab cd", logprobs=2, echo=True)
    (choice,) = found.choices
    assert "".join(choice.logprobs.tokens) == choice.text
    assert choice.text.startswith("ab cd")
    assert (choice.logprobs.token_logprobs[0], choice.logprobs.text_offset) == (None, list(range(len(choice.text))))
    assert all(len(top) == 2 for top in choice.logprobs.top_logprobs[1:])
    messages = [{"role": "user", "content": "ab"}]
    chat = client.chat.completions.create(**asked, messages=messages, logprobs=True, top_logprobs=3)
    content = chat.choices[0].logprobs.content
    assert "".join(each.token for each in content) == chat.choices[0].message.content
    assert all(each.logprob == max(other.logprob for other in each.top_logprobs) <= 0 for each in content)


def test_log_probabilities_of_a_text_are_the_same_as_a_prompt(client):
    asked = {"model": "tiny", "prompt": PROMPTS[0], "temperature": 0, "echo": True, "logprobs": 1}
    whole = client.completions.create(**asked, max_tokens=12).choices[0]
    again = client.completions.create(**asked | {"prompt": whole.text}, max_tokens=0).choices[0]
    assert again.logprobs == whole.logprobs


def test_log_probabilities_count_the_stop_token(client):
    asked = {"model": "tiny", "prompt": "ab", "max_tokens": 100, "temperature": 2, "seed": 0, "n": 8, "logprobs": 0}
    found = client.completions.create(**asked)
    assert {each.finish_reason for each in found.choices} == {"stop", "length"}
    assert sum(len(each.logprobs.tokens) for each in found.choices) == found.usage.completion_tokens


CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}


@pytest.mark.parametrize(
    ("path", "body", "code", "param"),
    [
        ("/chat/completions", {"model": "tiny"}, 400, "messages"),
        ("/chat/completions", CHAT | {"messages": []}, 400, "messages"),
        ("/chat/completions", CHAT | {"messages": [{"role": "pirate", "content": "Hi"}]}, 400, "messages[0].role"),
        ("/chat/completions", CHAT | {"messages": [{"role": "user", "content": 5}]}, 400, "messages[0].content"),
        ("/chat/completions", CHAT | {"model": "gpt-4"}, 404, "model"),
        ("/chat/completions", CHAT | {"temperature": -1}, 400, "temperature"),
        ("/chat/completions", CHAT | {"temperature": "hot"}, 400, "temperature"),
        ("/chat/completions", CHAT | {"max_tokens": 0}, 400, "max_tokens"),
        ("/chat/completions", CHAT | {"max_tokens": 9999}, 400, "messages"),
        ("/chat/completions", CHAT | {"n": 17}, 400, "n"),
        ("/chat/completions", CHAT | {"n": 9}, 400, "n"),  # two at once and six that wait
        ("/chat/completions", CHAT | {"stop": [""]}, 400, "stop"),
        ("/chat/completions", CHAT | {"stream": "yes"}, 400, "stream"),
        ("/chat/completions", CHAT | {"top_logprobs": 2}, 400, "top_logprobs"),
        ("/chat/completions", CHAT | {"tools": [{"type": "function"}]}, 400, "tools"),
        ("/chat/completions", CHAT | {"colour": "red"}, 400, "colour"),
        ("/completions", {"model": "tiny", "prompt": []}, 400, "prompt"),
        ("/completions", {"model": "tiny", "prompt": [99999]}, 400, "prompt"),
        ("/completions", {"model": "tiny", "prompt": "x" * 300}, 400, "prompt"),
        ("/nothing", {}, 404, None),
    ],
)
def test_bad_requests_get_the_error_form(client, path, body, code, param):
    error = status(client, path, **body)
    assert (error.status_code, error.param) == (code, param)
    assert error.body["message"]


def test_a_body_that_is_no_json_is_refused(address):
    surrogate = b'{"model": "tiny", "prompt": "\\ud800"}'
    wrong = [(b"{", "application/json", 400), (b"[1]", "application/json", 400), (surrogate, "application/json", 400)]
    for body, kind, code in [*wrong, (b"{}", "text/plain", 415)]:
        request = urllib.request.Request(f"{address}/v1/completions", body, {"Content-Type": kind})
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(request)
        with error.value as answer:
            assert answer.code == code
            assert json.load(answer)["error"]["type"] == "invalid_request_error"


def test_other_hosts_names_are_refused(address):
    for host, code in (("LOCALHOST:1", 200), ("[::1]:1", 200), ("attacker.example", 400), ("[", 400)):
        request = urllib.request.Request(f"{address}/v1/models", headers={"Host": host})
        if code == 200:
            urllib.request.urlopen(request).close()
            continue
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(request)
        with error.value as answer:
            assert answer.code == code
            assert "Host must name localhost" in json.load(answer)["error"]["message"]


def test_more_requests_than_the_queue_holds_get_429(client, address):
    def ask(_):
        try:
            client.completions.create(model="tiny", prompt="a", max_tokens=250, extra_body={"ignore_eos": True})
        except openai.RateLimitError as error:
            return error.response.headers["Retry-After"]
        return "done"

    with concurrent.futures.ThreadPoolExecutor(24) as threads:
        found = list(threads.map(ask, range(24)))
    assert set(found) == {"done", "1"}
    assert found.count("done") >= 8  # two at once and six that wait
    assert settled(address, "littlebit_running", 0)


def test_a_client_that_leaves_is_dropped(client, address):
    body = {"model": "tiny", "prompt": "a", "max_tokens": 250, "n": 6, "extra_body": {"ignore_eos": True}}
    before = scrape(address)["littlebit_new_tokens_total"]
    stream = client.completions.create(**body, stream=True)
    next(iter(stream))
    stream.close()
    assert settled(address, "littlebit_running", 0)
    host, port = address.removeprefix("http://").split(":")
    plain = json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 250, "n": 6, "ignore_eos": True}).encode()
    with socket.create_connection((host, int(port))) as connection:  # leaves without reading the answer
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(plain)}\r\n\r\n".encode() + plain)
        assert settled(address, "littlebit_running", 2)
    assert settled(address, "littlebit_running", 0)
    assert settled(address, "littlebit_waiting", 0)
    assert scrape(address)["littlebit_new_tokens_total"] - before < 2 * 6 * 250


def test_key_timeout_and_health(chat_model, tmp_path):
    key = tmp_path / "key.txt"
    key.write_text("secret\n")
    with serving(chat_model, "--api-key-file", key, "--timeout", "0.0001") as (address, _):
        with urllib.request.urlopen(f"{address}/health") as health:
            assert json.load(health) == {"status": "ok"}
        for given, expected in (("wrong", 401), ("secret", 504)):
            with openai.OpenAI(base_url=f"{address}/v1", api_key=given, max_retries=0) as client:
                assert status(client, "/chat/completions", **CHAT).status_code == expected
        right = openai.OpenAI(base_url=f"{address}/v1", api_key="secret", max_retries=0)
        with right as client, pytest.raises(openai.APIError, match="longer than"):
            list(client.chat.completions.create(**CHAT, stream=True))


def test_the_page_chats_in_a_browser(address, local):
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install 'littlebit[browser]'")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        wrong = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(address)
        page.fill("#temperature", "0")
        page.fill("#text", "<b>Hi</b>")
        page.press("#text", "Enter")
        page.wait_for_selector("#speed:has-text('tokens/s')")
        assert page.inner_text("#model") == "tiny"
        assert page.text_content(".user") == "<b>Hi</b>"
        prompt = "[user] <b>Hi</b>\n[assistant] "
        assert page.text_content(".assistant") == local(prompt, 256 - len(prompt), temperature=0.0)
        assert not wrong
        browser.close()

"""Case 11: no key is shown, logged or frozen: neither one in the wrong setting, nor one in a program's words."""

import pytest

from pipeline.campaign.errors import ConfigError
from pipeline.config import settings
from pipeline.config.credentials import is_variable_name
from pipeline.external import chat
from pipeline.external.target_client import kind_of_words, one_line
from pipeline.model_calls.endpoint import Endpoint, post_chat

SECRET = "Zq9vK2mXw7Lp4Rt8"
JWT = f"eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.{SECRET}"


@pytest.mark.parametrize(
    "words",
    [
        "GET https://x/v1?api_key={} failed", "url: /v1?a=1&key={}&b=2", "https://s/o?X-Amz-Signature={}&X-Amz-Expires=1", "Signature={}",
        "https://s/o?sv=1&sig={}", "AWSAccessKeyId={}&Expires=1", "https://me:{}@host/", "access_token={}", "PASSWORD = '{}'",
        "Cookie: ka_sessionid={}; XSRF-TOKEN={}", "{{'Cookie': 'a=1; ka_sessionid={}'}}", "Set-Cookie: a={}; Path=/; HttpOnly",
        "Authorization: Token {}", "authorization: {}", "Proxy-Authorization: Basic {}", "{{'Authorization': 'Own {}'}}", "Bearer {} refused",
        "X-Api-Key: {}", '{{"api_key": "{}", "a": 1}}', "{{'token': '{}'}}", "password: {}", "token: {} is over",
        "hf_{}", "sk-{}", "sk-proj-{}", "KGAT_{}", "ghp_{}", "glpat-{}", "gsk_{}", "wrong hf_abc1{}.",
        "-----BEGIN RSA PRIVATE KEY-----\n{}\n-----END RSA PRIVATE KEY-----",
    ],
)  # fmt: skip
def test_case_11_credentials_in_a_program_s_words_are_masked(words):
    said = one_line(f"before {words.format(SECRET, SECRET)} after")
    assert SECRET not in said and "***" in said and said.startswith("before ") and said.endswith(" after"), said
    assert one_line(said) == said


def test_case_11_a_web_token_and_a_key_of_aws_are_masked():
    assert one_line(f"is {JWT} valid, AKIAIOSFODNN7EXAMPLE") == "is *** valid, ***"


@pytest.mark.parametrize(
    "words",
    [
        "Your API token has expired", "token: none", "KeyError: 'publicScore'", "No module named 'hf_transfer'", "risk-adjusted scikit-learn",
        "400 - Bad Request - authorization required", "invalid key: too short", "basic authentication is off", "cookies are off",
    ],
)  # fmt: skip
def test_case_11_words_without_a_credential_stay_whole(words):
    assert one_line(words) == words


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "part", ["x", "key", "eyJ-", "key:", "a=", "-----BEGIN ", "hf_", "://a", "cookie=a;", "key ", "authorization "]
)
def test_case_11_long_words_are_read_in_little_time(part):
    assert one_line(part * 40_000)


def test_case_11_what_is_masked_has_the_same_kind():
    assert kind_of_words(one_line(f"401 Client Error: Unauthorized for url: https://x?token={SECRET}")) == "credentials"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("api_key_env", f"sk-proj-{SECRET}"), ("api_key_env", f"hf_{SECRET}"), ("api_key_env", SECRET), ("api_key_env", JWT),
        ("api_key_env", f"gsk_{SECRET}"), ("api_key_env", SECRET + " "), ("api_key_env", f"{SECRET}/+=="), ("api_key_env", f"Bearer {SECRET}"),
        ("api_key_env", "A" * 62), ("api_key_env", "1KEY"), ("api_key_env", "AKIAIOSFODNN7EXAMPLE"), ("api_key_file", f"sk-{SECRET}"),
        ("model", f"sk-{SECRET}"), ("url", f"https://x/v1?api_key={SECRET}"), ("url", f"https://x/hf_{SECRET}/v1"),
    ],
)  # fmt: skip
def test_case_11_a_key_in_the_wrong_setting_is_refused_and_not_shown(key, value):
    for given in (f"policy.proposals.{key}={value}", f"policy.proposals.{key}='{value}'"):
        with pytest.raises(ConfigError) as error:
            settings.compose(["policy=llm", given])
        assert value not in str(error.value) and SECRET not in str(error.value)
        assert "'" not in given or f"policy.proposals.{key} = (not shown" in str(error.value)


def test_case_11_a_key_in_the_wrong_setting_is_not_shown_where_it_would_be_used():
    with pytest.raises(ConfigError, match="api_key_env may be a key") as error:
        post_chat(Endpoint("https://example.com/v1", "m", chat.USE, api_key_env=f"sk-{SECRET}"), b"{}")
    assert SECRET not in str(error.value)


def test_case_11_names_of_variables_are_taken():
    for name in (
        "OPENAI_API_KEY",
        "HF_TOKEN",
        "_key2",
        "hf_token",
        "MY_VERY_LONG_NAME_OF_A_KEY_FOR_THE_PROPOSER_2",
        "A",
        "ANTHROPIC_API_KEY",
    ):
        assert is_variable_name(name)
    chosen = settings.compose(["policy=llm", "policy.proposals.api_key_env=OPENAI_API_KEY"])
    assert chosen.policy.proposals.api_key_env == "OPENAI_API_KEY"

from moetrain.checkpoint.identity import upgraded


def test_data_without_a_template_is_that_of_an_older_version() -> None:
    older = {"sources": {"a": {"kind": "jsonl"}}, "tokenizer": {"vocab_size": 300}}
    now = {
        "sources": {"a": {"kind": "jsonl", "unreadable": "refuse"}},
        "tokenizer": {"vocab_size": 300, "template": "auto"},
    }
    assert upgraded({"data": older}) == upgraded({"data": now}) == {"data": now}

use super::*;
use crate::pki::Pki;
use meridio_proxy::sync::clock;
use serde_json::{Value, json};

/// A token that nobody signed.
pub fn unsigned(claims: &Value) -> String {
    let encode = |value: &Value| {
        let text = openssl::base64::encode_block(value.to_string().as_bytes());
        text.trim_end_matches('=')
            .replace('+', "-")
            .replace('/', "_")
    };
    let header = json!({"alg": "ES256", "typ": "JWT"});
    format!("{}.{}.AAAA", encode(&header), encode(claims))
}

struct Chain {
    hops: Vec<Hop>,
    tokens: Vec<String>,
}

/// Client, nsmgr, forwarder and endpoint, each with a token for the next; the
/// last one's is for the one before.
fn chain() -> Chain {
    let pki = Pki::new("td");
    let hop = |name: &str| Hop::new(&pki, name, name, Duration::from_secs(60));
    let hops: Vec<Hop> = ["client", "nsmgr", "forwarder"].map(hop).into();
    let token = |from: usize, to: usize| hops[from].token(&hops[to].as_peer()).unwrap().jwt;
    let tokens = vec![token(0, 1), token(1, 2), token(2, 1)];
    Chain { hops, tokens }
}

#[test]
fn a_good_chain_passes_at_every_hop() {
    let Chain { hops, tokens } = chain();
    for index in 1..tokens.len() {
        let leaf = hops[index - 1].as_peer().leaf;
        authorize(&tokens[..=index], index, &leaf, clock::wall()).unwrap();
    }
}

#[test]
fn each_policy_refuses() {
    let Chain { hops, tokens } = chain();
    let leaf = hops[1].as_peer().leaf;
    let now = clock::wall();
    let late = now + Duration::from_secs(61);
    let with = |n: usize, token: String| {
        let mut tokens = tokens.clone();
        tokens[n] = token;
        tokens
    };
    let exp = 4_000_000_000_u64;
    let aud = |aud: Value| unsigned(&json!({"sub": "spiffe://td/client", "aud": aud, "exp": exp}));
    let id = |n: usize| hops[n].identity().svid.id.as_str().to_owned();
    let cases: Vec<(&str, Vec<String>, usize, SystemTime)> = vec![
        ("tokens_valid", with(0, String::new()), 2, now),
        ("tokens_valid", with(1, "a.b".to_owned()), 2, now),
        ("tokens_expired", tokens.clone(), 2, late),
        (
            "tokens_expired",
            with(0, unsigned(&json!({"sub": "x"}))),
            2,
            now,
        ),
        (
            "tokens_chained",
            with(0, aud(json!(["spiffe://td/other"]))),
            2,
            now,
        ),
        ("tokens_chained", with(0, aud(json!(id(1)))), 2, now),
        (
            "eval_conflict_error: tokens_chained",
            with(0, aud(json!([id(1), "x"]))),
            2,
            now,
        ),
        ("tokens_chained", with(0, aud(json!([]))), 2, now),
        ("prev_token_signed", tokens[..=1].to_vec(), 1, now),
        ("prev_token_signed", tokens[..1].to_vec(), 0, now),
    ];
    for (policy, tokens, index, now) in cases {
        let error = authorize(&tokens, index, &leaf, now).unwrap_err();
        let text = error.to_string();
        assert!(text.starts_with(policy), "{policy}: {text}");
    }
    authorize(&with(0, aud(json!([id(1)]))), 2, &leaf, now).unwrap();
}

#[test]
fn a_name_belongs_to_who_registered_it() {
    let mut owners = Owners::default();
    owners.client_allowed("ns/a", "one").unwrap();
    owners.set("ns/a", "one");
    owners.client_allowed("ns/a", "one").unwrap();
    owners.client_allowed("ns/b", "two").unwrap();
    assert!(
        owners
            .client_allowed("ns/a", "two")
            .unwrap_err()
            .contains("client_allowed")
    );
    owners.forget("ns/a");
    owners.client_allowed("ns/a", "two").unwrap();
}

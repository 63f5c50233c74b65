use super::*;
use meridio_proxy::proto::connection::Path;

fn connection(id: &str, index: u32, segments: &[(&str, &str)]) -> Connection {
    Connection {
        id: id.to_owned(),
        path: Some(Path {
            index,
            path_segments: segments
                .iter()
                .map(|(name, id)| segment(name, id))
                .collect(),
            ..Default::default()
        })
        .into(),
        ..Default::default()
    }
}

fn ids(connection: &Connection) -> Vec<(String, String)> {
    let segments = connection.path.path_segments.iter();
    segments.map(|s| (s.name.clone(), s.id.clone())).collect()
}

#[test]
fn a_new_hop_is_appended_and_left_again() {
    let mut c = connection("c1", 0, &[("client", "c1")]);
    enter(&mut c, "nsmgr").unwrap();
    let own = c.path.path_segments[1].id.clone();
    assert_eq!((c.path.index, &c.id), (1, &own));
    assert_eq!(own.len(), 36);
    leave(&mut c);
    assert_eq!((c.path.index, c.id.as_str()), (0, "c1"));
    // On a refresh the hop keeps its id; a stale tail stays until trimmed.
    c.path
        .mut_or_insert_default()
        .path_segments
        .push(segment("fwd", "f1"));
    enter(&mut c, "nsmgr").unwrap();
    assert_eq!(c.id, own);
    trim(&mut c);
    assert_eq!(ids(&c).len(), 2);
}

#[test]
fn a_renamed_hop_gets_a_new_id_and_keeps_what_follows() {
    let mut c = connection("c1", 0, &[("client", "c1"), ("old", "n1"), ("fwd", "f1")]);
    enter(&mut c, "new").unwrap();
    let after = ids(&c);
    assert_eq!(after[1].0, "new");
    assert_ne!(after[1].1, "n1");
    assert_eq!(after[2], ("fwd".to_owned(), "f1".to_owned()));
}

#[test]
fn wrong_paths_are_refused() {
    let mut c = connection("other", 0, &[("client", "c1")]);
    assert!(
        enter(&mut c, "nsmgr")
            .unwrap_err()
            .contains("should be equal")
    );
    let mut c = connection("c1", 1, &[("client", "c1")]);
    assert!(
        enter(&mut c, "nsmgr")
            .unwrap_err()
            .contains("should be less")
    );
    // No path: the hop puts itself first, and authorisation fails later.
    let mut c = connection("c1", 0, &[]);
    enter(&mut c, "nsmgr").unwrap();
    assert_eq!(ids(&c), [("nsmgr".to_owned(), "c1".to_owned())]);
    // The index already points to this hop: no move.
    let mut c = connection("x", 1, &[("client", "c1"), ("nsmgr", "n1")]);
    enter(&mut c, "nsmgr").unwrap();
    assert_eq!((c.id.as_str(), c.path.index), ("n1", 1));
}

#[test]
fn tokens_go_into_both_segments() {
    let token = |jwt: &str, seconds| Token {
        jwt: jwt.to_owned(),
        expires: UNIX_EPOCH + Duration::from_secs(seconds),
    };
    let mut c = connection("c1", 0, &[("client", "c1")]);
    enter(&mut c, "nsmgr").unwrap();
    update_tokens(&mut c, Some(&token("t0", 50)), &token("t1", 40)).unwrap();
    assert_eq!(tokens(&c), ["t0", "t1"]);
    assert_eq!(
        earliest_expiry(&c),
        Some(UNIX_EPOCH + Duration::from_secs(40))
    );
    c.path.mut_or_insert_default().path_segments[0].expires = None.into();
    assert_eq!(earliest_expiry(&c), None);
}

#[test]
fn registry_path() {
    for empty in [
        r#"{"Index":0,"PathSegments":null}"#,
        r#"{"Index":0,"PathSegments":[]}"#,
        r#"{"index":0}"#,
    ] {
        let mut path = RegistryPath::parse(empty).unwrap();
        path.enter("c", "n").unwrap();
        path.enter("n2", "r").unwrap();
        assert_eq!(
            (path.index, path.so_far()),
            (2, vec!["c".into(), "n2".into(), "r".into()])
        );
        let text = path.to_json();
        assert_eq!(RegistryPath::parse(&text), Ok(path));
    }
    let mut echoed = RegistryPath::parse(
        r#"{"Index":0,"PathSegments":[{"token":"a"},{"token":"b"},{"token":"c"}]}"#,
    )
    .unwrap();
    echoed.enter("A", "B").unwrap();
    assert_eq!(echoed.tokens, ["A", "B", "c"]);
    assert_eq!(echoed.so_far(), ["A", "B"]);
    let mut wrong = RegistryPath {
        index: 1,
        tokens: vec!["a".into()],
    };
    assert!(wrong.enter("A", "B").is_err());
    for bad in ["", "[]", "x", r#"{"Index":-1}"#, r#"{"PathSegments":[{}]}"#] {
        assert!(RegistryPath::parse(bad).is_err(), "{bad}");
    }
}

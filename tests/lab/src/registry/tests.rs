use super::*;
use meridio_proxy::proto::registry::NetworkServiceLabels;
use std::time::UNIX_EPOCH;

fn endpoint(name: &str, service: &str, node: &str) -> NetworkServiceEndpoint {
    let labels = NetworkServiceLabels {
        labels: [("nodeName".to_owned(), node.to_owned())].into(),
        ..Default::default()
    };
    NetworkServiceEndpoint {
        name: name.to_owned(),
        network_service_names: vec![service.to_owned()],
        network_service_labels: [(service.to_owned(), labels)].into(),
        url: "inode://1/2".to_owned(),
        ..Default::default()
    }
}

#[test]
fn queries() {
    let is = endpoint("lb-1", "lb", "a");
    let query = |change: &dyn Fn(&mut NetworkServiceEndpoint)| {
        let mut query = NetworkServiceEndpoint::new();
        change(&mut query);
        endpoint_matches(&query, &is)
    };
    assert!(query(&|_| ()));
    assert!(query(&|q| q.name = "lb-1".into()));
    assert!(!query(&|q| q.name = "lb".into()), "names match whole");
    assert!(query(&|q| q.url = "inode".into()), "URLs match in part");
    assert!(query(&|q| q.network_service_names = vec!["lb".into()]));
    assert!(!query(
        &|q| q.network_service_names = vec!["lb".into(), "x".into()]
    ));
    assert!(!query(
        &|q| q.expiration_time = Some(timestamp(clock::wall())).into()
    ));
    assert!(query(
        &|q| q.network_service_labels = is.network_service_labels.clone()
    ));
    assert!(!query(&|q| {
        q.network_service_labels = endpoint("", "lb", "b").network_service_labels;
    }));
}

#[test]
fn expiry_is_the_earliest_of_all() {
    let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
    let cap = Duration::from_secs(60);
    for (wished, tokens, want) in [
        (Some(150), [900, 900], 150),
        (Some(900), [900, 900], 160),
        (None, [900, 900], 160),
        (Some(900), [130, 900], 130),
        (Some(900), [900, 140], 140),
        (Some(0), [900, 900], 0),
    ] {
        let got = effective_expiry(wished.map(at), tokens.map(at), cap, at(100));
        assert_eq!(got, at(want), "{wished:?} {tokens:?}");
    }
}

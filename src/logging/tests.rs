use std::io::Read;
use std::sync::atomic::Ordering;
use std::time::{Duration, UNIX_EPOCH};

use serde_json::json;

use super::*;
use crate::sync::stop::stop_pair;

fn parse(bytes: &[u8]) -> Json {
    let text = std::str::from_utf8(bytes).unwrap();
    assert_eq!(text.find('\n'), Some(text.len() - 1), "one line: {text:?}");
    serde_json::from_str(text).unwrap()
}

#[test]
fn golden_line() {
    let pairs = [("id", Value::from("lb-1")), ("index", Value::from(7))];
    let record = Record::builder()
        .level(Level::Warn)
        .target("meridio_proxy::nsm")
        .args(format_args!("Closed network service endpoint"))
        .key_values(&pairs)
        .build();
    let at = UNIX_EPOCH + Duration::from_millis(1_795_564_215_250);
    let stamp = time::format(at);
    assert_eq!(
        String::from_utf8(line(&record, at)).unwrap(),
        format!(
            "{{\"severity\":\"warning\",\"timestamp\":\"{stamp}\",\
             \"service_id\":\"Meridio-proxy\",\
             \"message\":\"Closed network service endpoint\",\"version\":\"1.0.0\",\
             \"extra_data\":{{\"id\":\"lb-1\",\"index\":7}}}}\n"
        )
    );
    assert!(stamp.contains(":15.25"), "{stamp}");
}

#[test]
fn severities() {
    for (level, target, severity) in [
        (Level::Error, "x", "error"),
        (Level::Error, CRITICAL, "critical"),
        (Level::Warn, "x", "warning"),
        (Level::Info, "x", "info"),
        (Level::Debug, "x", "debug"),
        (Level::Trace, "x", "debug"),
    ] {
        let record = Record::builder().level(level).target(target).build();
        assert_eq!(parse(&line(&record, UNIX_EPOCH))["severity"], severity);
    }
}

#[test]
fn values_keep_their_types() {
    let nested = r#"{"NSM_MTU":"1500"}"#;
    let long = "ä".repeat(TEXT_MAX);
    let pairs = [
        ("text", Value::from("a\"b\nc\u{1b}[31m")),
        ("yes", Value::from(true)),
        ("minus", Value::from(-3)),
        ("half", Value::from(0.5)),
        ("config", Value::from(nested)),
        ("other", Value::from(nested)),
        ("long", Value::from(long.as_str())),
    ];
    let record = Record::builder()
        .level(Level::Info)
        .module_path(Some("grpcio::log_util"))
        .key_values(&pairs)
        .build();
    let extra = parse(&line(&record, UNIX_EPOCH))["extra_data"].clone();
    assert_eq!(extra["text"], "a\"b\nc\u{1b}[31m");
    assert_eq!(extra["yes"], json!(true));
    assert_eq!(extra["minus"], json!(-3));
    assert_eq!(extra["half"], json!(0.5));
    assert_eq!(extra["config"], json!({"NSM_MTU": "1500"}));
    assert_eq!(extra["other"], nested);
    assert_eq!(extra["subsystem"], "gRPC");
    assert!(extra["long"].as_str().unwrap().len() <= TEXT_MAX + 4);
}

#[test]
fn a_full_queue_drops_and_counts() {
    let (mut queue, lines) = output::queue();
    let dropped = queue.dropped();
    for _ in 0..4096 + 3 {
        queue.write_all(b"x\n").unwrap();
    }
    assert_eq!(dropped.load(Ordering::Relaxed), 3);

    let (mut reader, writer) = io::pipe().unwrap();
    let output = Output::to(std::os::fd::OwnedFd::from(writer).into());
    let (stopper, stop) = stop_pair();
    stopper.stop();
    drop(queue);
    // What is queued is written although the thread was told to stop.
    output::run(&output, &lines, &dropped, &stop);
    drop(output);
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    assert_eq!(text.matches("x\n").count(), 4096);
    assert!(text.contains(r#""extra_data":{"dropped":3}"#), "{text}");
}

#[test]
fn a_reader_that_does_not_read_is_given_up() {
    let (_reader, writer) = io::pipe().unwrap();
    let output = Output::to(std::os::fd::OwnedFd::from(writer).into());
    let deadline = clock::now() + Duration::from_millis(20);
    let error = output
        .write(&vec![b'x'; 1 << 20], Some(deadline))
        .unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
}

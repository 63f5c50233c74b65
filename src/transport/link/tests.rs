//! A link with a peer and gRPC's end, all on one thread.

use super::*;
use crate::sync::clock;
use crate::transport::dialer::pair;
use crate::transport::fd_socket::Socket;
use openssl::ssl::{Ssl, SslContext, SslMethod, SslVersion};

/// Both ends of a session, without certificates, which no link looks at.
fn session() -> [SslStream<FdSocket>; 2] {
    let mut builder = SslContext::builder(SslMethod::tls()).unwrap();
    builder
        .set_max_proto_version(Some(SslVersion::TLS1_2))
        .unwrap();
    builder
        .set_cipher_list("AECDH-AES256-SHA:@SECLEVEL=0")
        .unwrap();
    let context = builder.build();
    let (one, other) = pair().unwrap();
    let mut ends = [one, other].map(|socket| {
        let socket = FdSocket::new(Socket::Unix(socket));
        SslStream::new(Ssl::new(&context).unwrap(), socket).unwrap()
    });
    for _ in 0..10 {
        let _ = ends[0].connect();
        let _ = ends[1].accept();
    }
    assert!(ends.iter().all(|end| end.ssl().is_init_finished()));
    ends
}

/// A link with its peer's and gRPC's ends.
fn link() -> (Link, SslStream<FdSocket>, UnixStream) {
    let [session, peer] = session();
    let (ours, grpcs) = pair().unwrap();
    let wake = Arc::new(WakeFd::new().unwrap());
    (Link::new(session, ours, false, wake), peer, grpcs)
}

#[test]
fn what_grpc_wrote_before_a_close_still_goes_out() {
    let (mut link, mut peer, mut grpcs) = link();
    let sent = vec![7; 100_000];
    grpcs.write_all(&sent).unwrap();
    link.handle().request_close();
    let now = clock::now();
    let (mut received, mut room) = (Vec::new(), [0; 16_384]);
    for _ in 0..100 {
        link.turn(now);
        while let Ok(count) = peer.ssl_read(&mut room) {
            received.extend_from_slice(&room[..count]);
        }
    }
    assert!(received == sent, "{} bytes", received.len());
    assert!(!link.handle().is_open() && !link.is_over());
    drop(peer);
    link.turn(now);
    assert!(link.is_over());
}

#[test]
fn a_close_does_not_wait_for_a_peer_that_does_not_read() {
    let (mut link, _peer, mut grpcs) = link();
    let now = clock::now();
    while grpcs.write(&[7; 10_000]).is_ok() {
        link.turn(now);
    }
    link.handle().request_close();
    link.turn(now);
    assert_eq!(link.deadline(), Some(now + LINGER));
    link.turn(now + LINGER);
    assert!(link.is_over());
}

#[test]
fn what_the_peer_wrote_before_it_went_still_arrives() {
    let (mut link, mut peer, mut grpcs) = link();
    peer.ssl_write(b"the answer").unwrap();
    drop(peer);
    // Writing finds out that the peer has gone before reading does.
    grpcs.write_all(b"a ping").unwrap();
    link.turn(clock::now());
    let mut answer = [0; 100];
    let count = grpcs.read(&mut answer).unwrap();
    assert_eq!(&answer[..count], b"the answer");
    assert!(link.is_over());
}

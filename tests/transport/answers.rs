//! Servers whose answer to a unary call is no single message.

use futures_util::SinkExt;
use grpcio::{RpcContext, ServerStreamingSink, ServiceBuilder, WriteFlags};
use meridio_proxy::proto::registry::NetworkService;
use meridio_proxy::rpc::method::NS_REGISTER;
use meridio_proxy::rpc::status::RpcError;
use meridio_proxy::transport::server::{PeerTable, TlsServer};

use crate::rig::{Rig, named};

/// What a call to Register brings when it is answered OK with `count` messages.
fn answered_with(count: usize) -> Result<String, RpcError> {
    let rig = Rig::new();
    let path = rig.path("s.sock");
    let handler = move |context: RpcContext<'_>,
                        _: NetworkService,
                        mut sink: ServerStreamingSink<NetworkService>| {
        context.spawn(async move {
            for number in 0..count {
                let message = named(&number.to_string());
                if sink.send((message, WriteFlags::default())).await.is_err() {
                    // The caller has had enough.
                    return;
                }
            }
            let _ = sink.close().await;
        });
    };
    let service = ServiceBuilder::new()
        .add_server_streaming_handler(&NS_REGISTER, handler)
        .build();
    let (cell, at, peers) = (rig.server_cell(), path.clone(), PeerTable::default());
    let _server = TlsServer::start(&rig.threads, &rig.rpc, cell, at, peers, vec![service]).unwrap();
    let connector = rig.connect_unix(rig.client_cell(), &path);
    let connection = rig.acquire(&connector);
    let answers: Vec<_> = (0..5)
        .map(|_| {
            rig.echo(&connection, "n", &[])
                .map(|reply| reply.message.name)
        })
        .collect();
    assert!(
        answers.windows(2).all(|two| two[0] == two[1]),
        "{answers:?}"
    );
    answers[0].clone()
}

#[test]
fn an_answer_is_one_message() {
    assert_eq!(answered_with(1), Ok("0".to_owned()));
    for (count, why) in [(0, "none"), (2, "more than one"), (50, "more than one")] {
        let error = answered_with(count).unwrap_err();
        assert!(
            matches!(&error, RpcError::Undecodable(text) if text.contains(why)),
            "{error}"
        );
    }
}

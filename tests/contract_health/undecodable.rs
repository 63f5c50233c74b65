//! Requests whose bytes are no message.

use grpcio::{GrpcSlice, Marshaller, MessageReader, Method, MethodType};
use meridio_proxy::health::HealthCell;
use meridio_proxy::health::server::HealthServer;
use meridio_proxy::proto::health::health_check_response::ServingStatus;
use meridio_proxy::rpc::call::{self, Options};
use meridio_proxy::rpc::env::Rpc;
use meridio_proxy::rpc::method::{HEALTH_CHECK, HEALTH_WATCH};
use meridio_proxy::rpc::pump::{self, Item, StreamError};
use meridio_proxy::rpc::status::Code;
use meridio_proxy::sync::stop::stop_pair;

use super::{Directory, LIMIT, channel, check, next, nothing_more, watch};

#[allow(clippy::ptr_arg, reason = "the signature that grpcio asks for")]
fn put(bytes: &Vec<u8>, out: &mut GrpcSlice) -> grpcio::Result<()> {
    *out = GrpcSlice::from(bytes.clone());
    Ok(())
}

fn take(_: MessageReader) -> grpcio::Result<Vec<u8>> {
    Ok(Vec::new())
}

#[test]
fn a_request_that_cannot_be_decoded_is_refused_alone() {
    let directory = Directory::new("undecodable");
    let path = directory.0.join("health.sock");
    let (rpc, cell) = (Rpc::new(), HealthCell::new());
    let server = HealthServer::start(&rpc, &path, &cell).unwrap();
    let channel = channel(&rpc, &path);
    // A status and no hang-up: the stream of the same connection goes on.
    let pump = watch(&channel, "");
    assert_eq!(next(&pump), ServingStatus::SERVING);
    let truncated = vec![0x0a, 0x7f, b'a'];
    let nested = vec![0x0b; 100_000];
    let no_text = vec![0x0a, 0x02, 0xff, 0xfe];
    for ty in [HEALTH_CHECK.ty, HEALTH_WATCH.ty] {
        let name = match ty {
            MethodType::Unary => HEALTH_CHECK.name,
            _ => HEALTH_WATCH.name,
        };
        let marshaller = || Marshaller { ser: put, de: take };
        let raw = Method {
            ty,
            name,
            req_mar: marshaller(),
            resp_mar: marshaller(),
        };
        for bytes in [&truncated, &nested, &no_text] {
            let (_stopper, stop) = stop_pair();
            let options = Options::with_timeout(LIMIT);
            let code = match ty {
                MethodType::Unary => call::unary(&channel, &raw, bytes, &options, &stop)
                    .map(drop)
                    .unwrap_err()
                    .code(),
                _ => {
                    let refused = pump::open(&channel, &raw, bytes, &options).unwrap();
                    match refused.items().recv_timeout(LIMIT).unwrap() {
                        Item::Ended(end) => match end.unwrap_err() {
                            StreamError::Rpc(error) => error.code(),
                            other => panic!("{other:?}"),
                        },
                        Item::Message(answer) => panic!("{answer:?}"),
                    }
                }
            };
            assert_eq!(code, Some(Code::INTERNAL), "{name} {:?}", &bytes[..3]);
            assert_eq!(check(&channel, "").unwrap(), ServingStatus::SERVING);
        }
    }
    nothing_more(&pump);
    drop(pump);
    server.stop();
}

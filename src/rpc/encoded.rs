//! Messages that are encoded once and sent on many streams.

use std::io::Read;

use grpcio::{GrpcSlice, Marshaller, MessageReader, Method, pb_de, pb_ser};
use protobuf::Message;

/// A message as it is on the wire. Copies share the bytes, so that one message
/// for many streams is held once.
#[derive(Debug, Clone)]
pub struct Encoded(GrpcSlice);

impl Encoded {
    /// Encodes a message.
    ///
    /// # Errors
    ///
    /// When it is larger than protobuf allows (2 GiB).
    pub fn of(message: &impl Message) -> protobuf::Result<Self> {
        Ok(Self(GrpcSlice::from(message.write_to_bytes()?)))
    }

    /// The bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        self.0.as_slice()
    }

    #[allow(
        clippy::unnecessary_wraps,
        reason = "the signature that grpcio asks for"
    )]
    fn put(&self, out: &mut GrpcSlice) -> grpcio::Result<()> {
        *out = self.0.clone();
        Ok(())
    }

    fn take(mut reader: MessageReader) -> grpcio::Result<Self> {
        let mut bytes = Vec::with_capacity(reader.len());
        reader
            .read_to_end(&mut bytes)
            .map_err(|error| grpcio::Error::Codec(Box::new(error)))?;
        Ok(Self(GrpcSlice::from(bytes)))
    }
}

/// The method as it is served by one who sends encoded messages.
#[must_use]
pub fn encoded<Req: Message, Resp>(method: &Method<Req, Resp>) -> Method<Req, Encoded> {
    Method {
        ty: method.ty,
        name: method.name,
        req_mar: Marshaller {
            ser: pb_ser,
            de: pb_de,
        },
        resp_mar: Marshaller {
            ser: Encoded::put,
            de: Encoded::take,
        },
    }
}

//! TLS sessions: contexts made from an identity, and handshakes that do not
//! block.

use std::sync::Arc;
use std::time::SystemTime;

use openssl::error::ErrorStack;
use openssl::ssl::{
    AlpnError, ErrorCode, Ssl, SslContext, SslMethod, SslMode, SslOptions, SslSessionCacheMode,
    SslStream, SslVerifyMode, SslVersion,
};
use openssl::x509::{X509, X509StoreContextRef, X509VerifyResult};
use parking_lot::Mutex;

use super::fd_socket::{FdSocket, Socket};
use crate::spiffe::verify::verify_peer;
use crate::spiffe::{Identity, PeerIdentity};
use crate::sync::clock;
use crate::sync::poll::Interest;

/// ALPN in its wire form; grpc-go refuses peers that do not agree on it.
const ALPN_H2: &[u8] = b"\x02h2";
/// For TLS 1.2: what grpc-go offers, forward secrecy and AEAD only.
const CIPHERS: &str = "ECDHE+AESGCM:ECDHE+CHACHA20";

/// Which end of the handshake this process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    Client,
    Server,
}

/// Makes contexts, one for each identity.
pub(super) struct Contexts {
    role: Role,
    latest: Option<(Arc<Identity>, SslContext)>,
}

impl Contexts {
    pub(super) fn new(role: Role) -> Self {
        Self { role, latest: None }
    }

    fn get(&mut self, identity: &Arc<Identity>) -> Result<SslContext, ErrorStack> {
        if let Some((of, context)) = &self.latest
            && Arc::ptr_eq(of, identity)
        {
            return Ok(context.clone());
        }
        let context = context(identity, self.role)?;
        self.latest = Some((Arc::clone(identity), context.clone()));
        Ok(context)
    }
}

fn context(identity: &Identity, role: Role) -> Result<SslContext, ErrorStack> {
    let mut builder = SslContext::builder(match role {
        Role::Client => SslMethod::tls_client(),
        Role::Server => SslMethod::tls_server(),
    })?;
    builder.set_min_proto_version(Some(SslVersion::TLS1_2))?;
    builder.set_cipher_list(CIPHERS)?;
    builder.set_options(
        SslOptions::NO_TICKET | SslOptions::NO_RENEGOTIATION | SslOptions::NO_COMPRESSION,
    );
    builder.set_mode(
        SslMode::ENABLE_PARTIAL_WRITE
            | SslMode::ACCEPT_MOVING_WRITE_BUFFER
            | SslMode::RELEASE_BUFFERS
            | SslMode::NO_AUTO_CHAIN,
    );
    // A resumed session would skip the certificates, and NSM would verify our
    // tokens with the certificate of the session that it resumes.
    builder.set_session_cache_mode(SslSessionCacheMode::OFF);
    builder.set_num_tickets(0)?;
    let mut chain = identity.svid.chain.iter();
    if let Some(leaf) = chain.next() {
        builder.set_certificate(leaf)?;
    }
    for certificate in chain {
        builder.add_extra_chain_cert(certificate.clone())?;
    }
    builder.set_private_key(&identity.svid.key)?;
    match role {
        Role::Client => builder.set_alpn_protos(ALPN_H2)?,
        Role::Server => builder.set_alpn_select_callback(|_, offered| {
            openssl::ssl::select_next_proto(ALPN_H2, offered).ok_or(AlpnError::ALERT_FATAL)
        }),
    }
    Ok(builder.build())
}

/// A handshake under way.
pub(super) struct Handshake {
    stream: SslStream<FdSocket>,
    role: Role,
    identity: Arc<Identity>,
    /// Why the peer's chain was refused, for the log: OpenSSL's own text only
    /// says that it was.
    refusal: Arc<Mutex<Option<String>>>,
    wants_write: bool,
}

/// A verified session.
pub(super) struct Session {
    pub stream: SslStream<FdSocket>,
    pub peer: PeerIdentity,
    pub identity: Arc<Identity>,
}

impl Handshake {
    /// Prepares a handshake; nothing is sent yet.
    pub(super) fn new(
        contexts: &mut Contexts,
        identity: &Arc<Identity>,
        socket: Socket,
    ) -> Result<Self, String> {
        let role = contexts.role;
        let refusal = Arc::new(Mutex::new(None));
        let stream = contexts
            .get(identity)
            .and_then(|context| prepare(&context, role, identity, &refusal, socket))
            .map_err(|error| format!("preparing TLS: {error}"))?;
        Ok(Self {
            stream,
            role,
            identity: Arc::clone(identity),
            refusal,
            wants_write: false,
        })
    }

    /// Goes on as far as it can without blocking; true when the handshake is
    /// complete and the session can be taken with [`Handshake::finish`].
    pub(super) fn step(&mut self) -> Result<bool, String> {
        match self.stream.do_handshake() {
            Ok(()) => Ok(true),
            Err(error) => match error.code() {
                ErrorCode::WANT_READ | ErrorCode::WANT_WRITE => {
                    self.wants_write = error.code() == ErrorCode::WANT_WRITE;
                    Ok(false)
                }
                _ => Err(match self.refusal.lock().take() {
                    Some(refusal) => format!("TLS handshake: peer refused: {refusal}"),
                    None => format!("TLS handshake: {error}"),
                }),
            },
        }
    }

    /// What the next step waits for.
    pub(super) fn interest(&self) -> Interest {
        Interest {
            fd: self.stream.get_ref().raw(),
            read: !self.wants_write,
            write: self.wants_write,
        }
    }

    /// Verifies the peer. This is the check that counts; the one within the
    /// handshake only lets the peer see an alert.
    pub(super) fn finish(self, now: SystemTime) -> Result<Session, String> {
        let ssl = self.stream.ssl();
        if ssl.selected_alpn_protocol() != Some(b"h2") {
            return Err("TLS handshake: peer refused: it did not agree on ALPN h2".to_owned());
        }
        let mut chain: Vec<X509> = ssl.peer_certificate().into_iter().collect();
        if let Some(presented) = ssl.peer_cert_chain() {
            // Only a client finds the leaf in this list.
            let skip = usize::from(self.role == Role::Client);
            chain.extend(presented.iter().skip(skip).map(ToOwned::to_owned));
        }
        let peer = verify_peer(&chain, &self.identity.bundles, now)
            .map_err(|error| format!("TLS handshake: peer refused: {error}"))?;
        Ok(Session {
            stream: self.stream,
            peer,
            identity: self.identity,
        })
    }
}

fn prepare(
    context: &SslContext,
    role: Role,
    identity: &Arc<Identity>,
    refusal: &Arc<Mutex<Option<String>>>,
    socket: Socket,
) -> Result<SslStream<FdSocket>, ErrorStack> {
    let mut ssl = Ssl::new(context)?;
    let (identity, refusal) = (Arc::clone(identity), Arc::clone(refusal));
    ssl.set_verify_callback(
        SslVerifyMode::PEER | SslVerifyMode::FAIL_IF_NO_PEER_CERT,
        move |accepted, found| accepted || judge(found, &identity, &refusal),
    );
    match role {
        Role::Client => ssl.set_connect_state(),
        Role::Server => ssl.set_accept_state(),
    }
    SslStream::new(ssl, FdSocket::new(socket))
}

/// OpenSSL has no anchors here, so it always asks. What it shows is the chain
/// that it could build from what the peer presented.
fn judge(
    found: &mut X509StoreContextRef,
    identity: &Identity,
    refusal: &Mutex<Option<String>>,
) -> bool {
    let chain: Vec<X509> = found
        .chain()
        .map(|chain| chain.iter().map(ToOwned::to_owned).collect())
        .unwrap_or_default();
    match verify_peer(&chain, &identity.bundles, clock::wall()) {
        Ok(_) => {
            found.set_error(X509VerifyResult::OK);
            true
        }
        Err(error) => {
            *refusal.lock() = Some(error.to_string());
            false
        }
    }
}

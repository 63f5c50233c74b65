//! The TLS session: contexts and handshakes.

use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Instant;

use meridio_proxy::spiffe::verify::verify_peer;
use meridio_proxy::spiffe::{Identity, PeerIdentity};
use meridio_proxy::sync::{clock, poll};
use openssl::error::ErrorStack;
use openssl::ssl::{
    AlpnError, ErrorCode, Ssl, SslContext, SslContextBuilder, SslMethod, SslMode, SslOptions,
    SslSessionCacheMode, SslStream, SslVerifyMode, SslVersion, select_next_proto,
};
use openssl::x509::X509;

use super::socket::FdSocket;

const H2: &[u8] = b"\x02h2";

/// Which end of the handshake this is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Client,
    Server,
}

/// Whether a client offers ALPN; `Absent` is for the test of the refusal.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub enum Alpn {
    #[default]
    H2,
    Absent,
}

/// Does the handshake and verifies the peer; both by `deadline`.
pub fn handshake(
    socket: FdSocket,
    role: Role,
    alpn: Alpn,
    identity: &Identity,
    deadline: Instant,
) -> Result<(SslStream<FdSocket>, PeerIdentity), String> {
    let context = context(role, alpn, identity).map_err(|e| format!("TLS context: {e}"))?;
    let raw = socket.raw();
    let mut stream = Ssl::new(&context)
        .and_then(|ssl| SslStream::new(ssl, socket))
        .map_err(|error| format!("TLS session: {error}"))?;
    loop {
        let result = match role {
            Role::Client => stream.connect(),
            Role::Server => stream.accept(),
        };
        match result {
            Ok(()) => break,
            Err(error) if error.code() == ErrorCode::WANT_READ => ready(raw, false, deadline)?,
            Err(error) if error.code() == ErrorCode::WANT_WRITE => ready(raw, true, deadline)?,
            Err(error) => return Err(format!("TLS handshake: {error}")),
        }
    }
    if alpn == Alpn::H2 && stream.ssl().selected_alpn_protocol() != Some(b"h2") {
        return Err("TLS handshake: the peer did not negotiate ALPN h2".to_owned());
    }
    let peer = verify_peer(&peer_chain(&stream, role), &identity.bundles, clock::wall())
        .map_err(|error| format!("peer certificate: {}", error.0))?;
    Ok((stream, peer))
}

fn ready(fd: RawFd, write: bool, deadline: Instant) -> Result<(), String> {
    let interest = poll::Interest {
        fd,
        read: !write,
        write,
    };
    let found = poll::wait(&[interest], Some(deadline)).map_err(|e| format!("poll: {e}"))?;
    if found[0].read || found[0].write {
        Ok(())
    } else {
        Err("TLS handshake: timeout".to_owned())
    }
}

/// What the peer presented, leaf first. OpenSSL leaves the leaf out of the
/// chain on the server's side.
fn peer_chain(stream: &SslStream<FdSocket>, role: Role) -> Vec<X509> {
    let mut chain: Vec<X509> = match role {
        Role::Server => stream.ssl().peer_certificate().into_iter().collect(),
        Role::Client => Vec::new(),
    };
    if let Some(rest) = stream.ssl().peer_cert_chain() {
        chain.extend(rest.iter().map(ToOwned::to_owned));
    }
    chain
}

fn context(role: Role, alpn: Alpn, identity: &Identity) -> Result<SslContext, ErrorStack> {
    let mut builder = SslContextBuilder::new(SslMethod::tls())?;
    builder.set_min_proto_version(Some(SslVersion::TLS1_2))?;
    for (n, certificate) in identity.svid.chain.iter().enumerate() {
        if n == 0 {
            builder.set_certificate(certificate)?;
        } else {
            builder.add_extra_chain_cert(certificate.clone())?;
        }
    }
    builder.set_private_key(&identity.svid.key)?;
    builder.set_session_cache_mode(SslSessionCacheMode::OFF);
    builder.set_options(SslOptions::NO_TICKET | SslOptions::NO_COMPRESSION);
    builder.set_mode(SslMode::ENABLE_PARTIAL_WRITE | SslMode::ACCEPT_MOVING_WRITE_BUFFER);
    // The chain is judged by SPIFFE's rules after the handshake.
    builder.set_verify_callback(
        SslVerifyMode::PEER | SslVerifyMode::FAIL_IF_NO_PEER_CERT,
        |_, _| true,
    );
    match (role, alpn) {
        (Role::Client, Alpn::H2) => builder.set_alpn_protos(H2)?,
        (Role::Client, Alpn::Absent) => {}
        (Role::Server, _) => {
            builder.set_num_tickets(0)?;
            builder.set_alpn_select_callback(|_, offered| {
                select_next_proto(H2, offered).ok_or(AlpnError::ALERT_FATAL)
            });
        }
    }
    Ok(builder.build())
}

/// A shared identity, or why there is none.
pub fn current(cell: &meridio_proxy::spiffe::SvidCell) -> Result<Arc<Identity>, String> {
    cell.get().ok_or_else(|| "no SVID yet".to_owned())
}

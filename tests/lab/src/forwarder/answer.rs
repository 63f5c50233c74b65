//! Whether an endpoint's answer is complete and honest.

use meridio_proxy::proto::connection::{Connection, Mechanism, State};
use meridio_proxy::spiffe::PeerIdentity;
use meridio_proxy::spiffe::jwt;
use meridio_proxy::sync::clock;

use crate::path::system_time;
use crate::policy::{Hop, Refused, tokens_chained, tokens_expired};
use crate::tls::{FileId, parse_inode_url};

/// How Meridio names the network service of a conduit's proxies.
const PROXY: &str = "proxy.";

/// A KERNEL mechanism; empty parameters are left out.
pub fn mechanism(name: &str, url: &str) -> Mechanism {
    let mut mechanism = Mechanism {
        cls: "LOCAL".to_owned(),
        type_: "KERNEL".to_owned(),
        ..Default::default()
    };
    for (key, value) in [("name", name), ("inodeURL", url)] {
        if !value.is_empty() {
            mechanism
                .parameters
                .insert(key.to_owned(), value.to_owned());
        }
    }
    mechanism
}

/// Judges what an endpoint answered to `asked`; returns the file of its
/// namespace, whose descriptor must come on the same connection.
pub fn judge_answer(
    asked: &Connection,
    answer: &Connection,
    peer: &PeerIdentity,
    us: &Hop,
) -> Result<FileId, String> {
    same("id", &asked.id, &answer.id)?;
    same(
        "network_service",
        &asked.network_service,
        &answer.network_service,
    )?;
    same("payload", &asked.payload, &answer.payload)?;
    same("labels", &asked.labels, &answer.labels)?;
    same(
        "network_service_endpoint_name",
        &asked.network_service_endpoint_name,
        &answer.network_service_endpoint_name,
    )?;
    if answer.state != State::UP.into() {
        return Err(format!("state {:?}", answer.state));
    }
    judge_path(asked, answer, peer, us)?;
    if asked.network_service.starts_with(PROXY) {
        judge_proxy(answer)?;
    }
    judge_mechanism(asked, answer)
}

/// What targets need of a proxy, and other endpoints need not give.
fn judge_proxy(answer: &Connection) -> Result<(), String> {
    if answer.context.MTU == 0 {
        return Err("context without MTU".to_owned());
    }
    let ip = &answer.context.ip_context;
    if ip.src_ip_addrs.is_empty() || ip.dst_ip_addrs.is_empty() || ip.extra_prefixes.is_empty() {
        return Err("IP context lacks src, dst or gateways".to_owned());
    }
    Ok(())
}

fn same<T: PartialEq + std::fmt::Debug>(what: &str, asked: &T, answer: &T) -> Result<(), String> {
    if asked == answer {
        return Ok(());
    }
    Err(format!("{what} was {asked:?}, answered {answer:?}"))
}

fn judge_path(
    asked: &Connection,
    answer: &Connection,
    peer: &PeerIdentity,
    us: &Hop,
) -> Result<(), String> {
    same("path.index", &asked.path.index, &answer.path.index)?;
    let index = asked.path.index as usize;
    let segments = &answer.path.path_segments;
    if segments.len() != index + 2 {
        return Err(format!(
            "path of {} segments, not {}",
            segments.len(),
            index + 2
        ));
    }
    for (n, (before, after)) in asked.path.path_segments.iter().zip(segments).enumerate() {
        if n > index {
            continue;
        }
        same(&format!("name of segment {n}"), &before.name, &after.name)?;
        same(&format!("id of segment {n}"), &before.id, &after.id)?;
        // The token of our own segment is that of the call.
        if n < index {
            same(
                &format!("token of segment {n}"),
                &before.token,
                &after.token,
            )?;
            same(
                &format!("expires of segment {n}"),
                &before.expires,
                &after.expires,
            )?;
        }
    }
    let own = &segments[index + 1];
    same(
        "name of its segment",
        &asked.network_service_endpoint_name,
        &own.name,
    )?;
    if own.id.is_empty() {
        return Err("its segment has no id".to_owned());
    }
    let now = clock::wall();
    let pair = [segments[index].token.clone(), own.token.clone()];
    let text = |refused: Refused| refused.to_string();
    tokens_chained(&pair).map_err(text)?;
    tokens_expired(&pair, now).map_err(text)?;
    jwt::verify(&own.token, &peer.leaf).map_err(|e| format!("next_token_signed: {e}"))?;
    let claims = jwt::claims(&own.token).map_err(|e| format!("its token: {e}"))?;
    let want = [us.identity().svid.id.as_str().to_owned()];
    if claims.aud.as_deref() != Some(&want) {
        return Err(format!("its token is for {:?}, not {want:?}", claims.aud));
    }
    // What came from the client is its own affair.
    for (n, segment) in segments.iter().enumerate().skip(index) {
        let expires = segment.expires.as_ref().map(system_time);
        if expires.is_none_or(|at| at <= now) {
            return Err(format!("expires of segment {n} is {expires:?}"));
        }
    }
    Ok(())
}

fn judge_mechanism(asked: &Connection, answer: &Connection) -> Result<FileId, String> {
    let mechanism = answer.mechanism.as_ref().ok_or("no mechanism")?;
    if mechanism.cls != "LOCAL" || mechanism.type_ != "KERNEL" {
        return Err(format!("mechanism {}/{}", mechanism.cls, mechanism.type_));
    }
    let parameter = |key: &str| mechanism.parameters.get(key).map_or("", String::as_str);
    let name = parameter("name");
    let allowed = |b: u8| b.is_ascii_graphic() && b != b'/';
    if name.is_empty() || name.len() > 15 || !name.bytes().all(allowed) {
        return Err(format!("interface name {name:?}"));
    }
    if let Some(before) = asked.mechanism.parameters.get("name") {
        same("interface name on a refresh", before, &name.to_owned())?;
    }
    parse_inode_url(parameter("inodeURL"))
}

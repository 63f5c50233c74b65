//! How the link to a target is made: a kernel interface in this network
//! namespace, or nothing at all (NSM: sdk networkservice/common/mechanisms).

use crate::core::ids::IfName;
use crate::proto::connection::{Connection, Mechanism};
use crate::proto::networkservice::NetworkServiceRequest;
use crate::rpc::status::{Code, RpcError};

const KERNEL: &str = "KERNEL";
const NOOP: &str = "NOOP";
const LOCAL: &str = "LOCAL";
/// The parameter with the interface's name.
const NAME: &str = "name";
/// The parameter that names the network namespace.
const INODE_URL: &str = "inodeURL";
/// The metric that names the interface.
const METRIC: &str = "server_interface";

/// What a request's mechanism comes to.
#[derive(Debug, Clone, PartialEq)]
pub struct Chosen {
    /// The mechanism to answer with.
    pub mechanism: Mechanism,
    /// The interface.
    pub link: Link,
}

/// The interface of a mechanism.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Link {
    /// The mechanism makes none.
    None,
    /// A kernel interface with the name that an earlier answer gave it.
    Named(IfName),
    /// A kernel interface that the peer would like to be named so. No NSM
    /// forwarder does, but nsmgr when it calls the endpoint itself, with a name
    /// from the target's namespace (networkservicemesh/deployments-k8s 12032).
    Preferred(IfName),
    /// A kernel interface that we shall name.
    Unnamed,
}

/// The mechanism of a request: the connection's own, or the first preference
/// that we can serve.
///
/// # Errors
///
/// UNKNOWN (as in NSM) when there is none; it lists why.
pub fn choose(request: &NetworkServiceRequest) -> Result<Chosen, RpcError> {
    if let Some(mechanism) = request.connection.mechanism.as_ref() {
        return judge(mechanism).map_err(|why| RpcError::status(Code::UNKNOWN, why));
    }
    let mut reasons = Vec::new();
    for preference in &request.mechanism_preferences {
        match judge(preference) {
            Ok(mut chosen) => {
                if let Link::Named(name) = chosen.link {
                    chosen.link = Link::Preferred(name);
                }
                return Ok(chosen);
            }
            // A hostile list shall not make an answer of its own size.
            Err(why) if reasons.len() < 8 => reasons.push(why),
            Err(_) => {}
        }
    }
    let why = match reasons.as_slice() {
        [] => "no mechanism was preferred".to_owned(),
        reasons => reasons.join("; "),
    };
    let text = format!("cannot support any of the requested mechanism: {why}");
    Err(RpcError::status(Code::UNKNOWN, text))
}

fn judge(mechanism: &Mechanism) -> Result<Chosen, String> {
    let link = match mechanism.type_.as_str() {
        NOOP => Link::None,
        KERNEL => match mechanism.parameters.get(NAME).map(String::as_str) {
            None | Some("") => Link::Unnamed,
            Some(name) => Link::Named(usable(name)?),
        },
        other => {
            let shown: String = other.chars().take(32).collect();
            return Err(format!("unsupported mechanism {shown:?}"));
        }
    };
    let mut mechanism = mechanism.clone();
    if mechanism.cls.is_empty() {
        LOCAL.clone_into(&mut mechanism.cls);
    }
    Ok(Chosen { mechanism, link })
}

fn usable(name: &str) -> Result<IfName, String> {
    let shown: String = name.chars().take(32).collect();
    let usable = IfName::parse(name).map_err(|_| {
        format!(
            "{shown:?} is no interface name of at most {} bytes",
            IfName::MAX
        )
    })?;
    if usable.is_the_pods() {
        return Err(format!("interface {shown:?} is not a connection's to make"));
    }
    Ok(usable)
}

/// Puts the mechanism into the connection, with the interface's name and the
/// URL of our namespace; `None` for a mechanism without interface.
pub fn set(connection: &mut Connection, mut mechanism: Mechanism, link: Option<(&IfName, String)>) {
    if let Some((name, url)) = link {
        let parameters = &mut mechanism.parameters;
        parameters.insert(NAME.to_owned(), name.to_string());
        parameters.insert(INODE_URL.to_owned(), url);
        let segments = &mut connection.path.mut_or_insert_default().path_segments;
        if let Some(own) = segments.last_mut() {
            let metric = own.metrics.entry(METRIC.to_owned());
            metric.or_insert_with(|| format!("{KERNEL}/{name}"));
        }
    }
    connection.mechanism = Some(mechanism).into();
}

#[cfg(test)]
mod tests {
    use protobuf::MessageField;

    use super::*;
    use crate::proto::connection::{Path, PathSegment};

    fn mechanism(type_: &str, name: Option<&str>) -> Mechanism {
        let mut mechanism = Mechanism {
            type_: type_.to_owned(),
            ..Mechanism::default()
        };
        mechanism
            .parameters
            .insert("kept".to_owned(), "1".to_owned());
        if let Some(name) = name {
            mechanism
                .parameters
                .insert(NAME.to_owned(), name.to_owned());
        }
        mechanism
    }

    fn request(own: Option<Mechanism>, preferences: Vec<Mechanism>) -> NetworkServiceRequest {
        let mut request = NetworkServiceRequest {
            mechanism_preferences: preferences,
            ..NetworkServiceRequest::default()
        };
        request.connection.mut_or_insert_default().mechanism = own.into();
        request
    }

    #[test]
    fn choosing() {
        let named = |name: &str| Ok(Link::Named(IfName::parse(name).unwrap()));
        let m = mechanism;
        for (own, preferences, expected) in [
            (Some(m(KERNEL, Some("proxy-1"))), vec![], named("proxy-1")),
            (
                Some(m(KERNEL, None)),
                vec![m(NOOP, None)],
                Ok(Link::Unnamed),
            ),
            (Some(m(NOOP, None)), vec![], Ok(Link::None)),
            (
                None,
                vec![m("MEMIF", None), m(KERNEL, Some(""))],
                Ok(Link::Unnamed),
            ),
            (None, vec![m(NOOP, None), m(KERNEL, None)], Ok(Link::None)),
            (
                None,
                vec![m(KERNEL, Some("nsm-0"))],
                Ok(Link::Preferred(IfName::parse("nsm-0").unwrap())),
            ),
            (
                None,
                vec![m(KERNEL, Some("a/b")), m(NOOP, None)],
                Ok(Link::None),
            ),
            (None, vec![], Err("no mechanism was preferred")),
            (
                None,
                vec![m("MEMIF", None)],
                Err("unsupported mechanism \"MEMIF\""),
            ),
            (
                Some(m("VXLAN", None)),
                vec![m(KERNEL, None)],
                Err("unsupported"),
            ),
            (Some(m("", None)), vec![], Err("unsupported")),
            (
                Some(m(KERNEL, Some("0123456789abcdef"))),
                vec![],
                Err("no interface name"),
            ),
            (
                Some(m(KERNEL, Some("../x"))),
                vec![],
                Err("no interface name"),
            ),
            (
                Some(m(KERNEL, Some("bridge0"))),
                vec![],
                Err("not a connection's"),
            ),
        ] {
            match (choose(&request(own, preferences)), expected) {
                (Ok(chosen), Ok(link)) => {
                    assert_eq!(chosen.link, link);
                    assert_eq!(chosen.mechanism.cls, LOCAL);
                    assert_eq!(chosen.mechanism.parameters["kept"], "1");
                }
                (Err(error), Err(text)) => {
                    assert_eq!(error.code(), Some(Code::UNKNOWN));
                    assert!(error.to_string().contains(text), "{error}");
                }
                (chosen, expected) => panic!("{chosen:?}, not {expected:?}"),
            }
        }
        assert!(choose(&NetworkServiceRequest::default()).is_err());
    }

    #[test]
    fn a_huge_list_makes_a_short_answer() {
        let huge = vec![mechanism(&"x".repeat(10_000), None); 100];
        let error = choose(&request(None, huge)).unwrap_err().to_string();
        assert!(error.len() < 1_000, "{} bytes", error.len());
    }

    #[test]
    fn setting_keeps_what_is_there() {
        let mut connection = Connection {
            path: MessageField::some(Path {
                path_segments: vec![PathSegment::default(); 2],
                ..Path::default()
            }),
            ..Connection::default()
        };
        let name = IfName::parse("p-1").unwrap();
        for url in ["inode://4/1", "inode://4/2"] {
            let link = Some((&name, url.to_owned()));
            set(&mut connection, mechanism(KERNEL, None), link);
            let parameters = &connection.mechanism.parameters;
            assert_eq!(
                (parameters[NAME].as_str(), parameters[INODE_URL].as_str()),
                ("p-1", url)
            );
        }
        let other = IfName::parse("p-2").unwrap();
        set(
            &mut connection,
            mechanism(KERNEL, None),
            Some((&other, String::new())),
        );
        let segments = &connection.path.path_segments;
        assert_eq!(segments[1].metrics[METRIC], "KERNEL/p-1", "only if absent");
        assert!(segments[0].metrics.is_empty());
        set(&mut connection, mechanism(NOOP, None), None);
        assert!(!connection.mechanism.parameters.contains_key(INODE_URL));
    }
}

use super::*;

const SECOND: Duration = Duration::from_secs(1);

struct Registry {
    mesh: Mesh,
    zero: Instant,
}

impl Registry {
    #[expect(clippy::disallowed_methods, reason = "the start of virtual time")]
    fn new() -> Self {
        let zero = Instant::now();
        Self {
            mesh: Mesh::new(zero),
            zero,
        }
    }

    fn at(&self, second: u32) -> Instant {
        self.zero + SECOND * second
    }

    fn until(&self, second: u32) -> Expiry {
        Expiry {
            told: SystemTime::UNIX_EPOCH + SECOND * second,
            at: self.at(second),
        }
    }

    fn seen(&mut self, second: u32, name: &str, expires: Expiry) -> Option<MeshAction> {
        self.seen_as(second, name, expires, 1)
    }

    fn seen_as(
        &mut self,
        second: u32,
        name: &str,
        expires: Expiry,
        incarnation: u64,
    ) -> Option<MeshAction> {
        let sighting = Sighting {
            name: name.to_owned(),
            expires: Some(expires),
            deleted: false,
            incarnation,
        };
        self.mesh.seen(&sighting, self.at(second)).unwrap()
    }

    /// At `second` the registry shows `name` until `expires`.
    fn shows(&mut self, second: u32, name: &str, expires: u32) -> Option<MeshAction> {
        let expires = self.until(expires);
        self.seen(second, name, expires)
    }

    fn deletes(&mut self, second: u32, name: &str) -> Option<MeshAction> {
        let sighting = Sighting {
            name: name.to_owned(),
            expires: Some(self.until(second + 60)),
            deleted: true,
            incarnation: 1,
        };
        self.mesh.seen(&sighting, self.at(second)).unwrap()
    }
}

fn connect(name: &str) -> Option<MeshAction> {
    Some(MeshAction::Connect(EndpointName::new(name)))
}

fn disconnect(name: &str, why: Gone) -> Option<MeshAction> {
    Some(MeshAction::Disconnect(EndpointName::new(name), why))
}

#[test]
fn repeated_sightings_connect_once_and_a_deletion_ends() {
    let mut r = Registry::new();
    assert_eq!(r.shows(0, "a", 60), connect("a"));
    assert_eq!(r.shows(0, "a", 60), None);
    assert_eq!(r.shows(1, "b", 60), connect("b"));
    assert_eq!(r.deletes(2, "a"), disconnect("a", Gone::Deleted));
    assert_eq!(r.deletes(2, "a"), None);
    assert_eq!(r.deletes(2, "never-seen"), None);
    assert_eq!(r.mesh.names().count(), 1);
    assert_eq!(r.deletes(3, "b"), disconnect("b", Gone::Deleted));
    assert_eq!(r.mesh.names().count(), 0);
    let now = r.at(4);
    assert_eq!(r.mesh.ended(&EndpointName::new("b"), now), None);
}

#[test]
fn an_endpoint_without_an_end_is_gone() {
    let mut r = Registry::new();
    let _ = r.shows(0, "a", 60);
    let sighting = Sighting {
        name: "a".to_owned(),
        expires: None,
        deleted: false,
        incarnation: 1,
    };
    let now = r.at(1);
    assert_eq!(
        r.mesh.seen(&sighting, now),
        Ok(disconnect("a", Gone::Deleted))
    );
}

#[test]
fn an_endpoint_that_returns_waits_for_the_close_of_its_old_session() {
    let mut r = Registry::new();
    let a = EndpointName::new("a");
    let _ = r.shows(0, "a", 60);
    let _ = r.deletes(1, "a");
    assert_eq!(r.shows(2, "a", 90), replaced("a"), "its Close is told");
    assert_eq!(r.shows(2, "a", 91), None, "once");
    let now = r.at(3);
    assert_eq!(r.mesh.ended(&a, now), connect("a"));
    let _ = r.deletes(4, "a");
    let _ = r.shows(5, "a", 90);
    assert_eq!(r.deletes(6, "a"), None, "gone again before the close ended");
    assert_eq!(r.mesh.ended(&a, now), None);
    assert_eq!(r.mesh.names().count(), 0);
    assert_eq!(r.mesh.ended(&a, now), None);
}

#[test]
fn expiry_needs_grace_and_a_fresh_list() {
    let mut r = Registry::new();
    let _ = r.shows(0, "a", 30);
    let _ = r.shows(0, "b", 600);
    // Periodic lists that begin before the grace is over prove nothing.
    let t = r.at(60);
    assert!(r.mesh.list_due(t) && !r.mesh.list_due(t));
    assert!(r.mesh.listed().is_empty());
    let t = r.at(120);
    assert_eq!(r.mesh.next_deadline(), t, "30 s plus the grace");
    assert!(r.mesh.list_due(t));
    assert_eq!(r.shows(120, "b", 600), None);
    assert_eq!(
        r.mesh.listed(),
        vec![disconnect("a", Gone::Expired).unwrap()]
    );
}

#[test]
fn a_renewal_in_the_list_saves_and_absence_alone_proves_nothing() {
    let mut r = Registry::new();
    let _ = r.shows(0, "a", 30);
    let _ = r.shows(0, "absent", 3600);
    let t = r.at(120);
    assert!(r.mesh.list_due(t));
    assert_eq!(r.shows(121, "a", 180), None);
    assert!(r.mesh.listed().is_empty());
    assert_eq!(r.mesh.names().count(), 2);
}

#[test]
fn a_renewal_by_a_clock_that_is_behind_is_a_sign_of_life() {
    let mut r = Registry::new();
    let base = r.zero;
    let _ = r.shows(200, "a", 100);
    for k in 0..10u32 {
        // Always expired by our clock, but renewed every 40 s.
        assert_eq!(r.shows(240 + 40 * k, "a", 140 + 40 * k), None);
        let t = base + SECOND * (241 + 40 * k);
        if r.mesh.list_due(t) {
            assert!(r.mesh.listed().is_empty());
        }
    }
    // The same end, carried over a moment later, is none.
    let mut r = Registry::new();
    let _ = r.shows(200, "a", 100);
    let mut same = r.until(100);
    same.at += SECOND * 5;
    assert_eq!(r.seen(289, "a", same), None);
    let t = r.at(290);
    assert!(r.mesh.list_due(t));
    assert_eq!(r.mesh.listed().len(), 1);
}

#[test]
fn a_step_of_our_wall_clock_ends_no_lb_that_is_renewed() {
    let mut r = Registry::new();
    let _ = r.shows(4000, "a", 4060);
    // Our clock is set an hour ahead: each renewal seems to end in the past.
    for second in (4030..4600).step_by(30) {
        let mut renewed = r.until(second + 60);
        renewed.at -= SECOND * 3600;
        assert_eq!(r.seen(second, "a", renewed), None);
        let t = r.at(second);
        if r.mesh.list_due(t) {
            assert!(r.mesh.listed().is_empty(), "at {second}");
        }
    }
}

#[test]
fn a_failed_list_proves_nothing_and_is_not_repeated_at_once() {
    let mut r = Registry::new();
    let _ = r.shows(0, "a", 10);
    let t = r.at(100);
    assert!(r.mesh.list_due(t));
    r.mesh.list_failed(t);
    assert!(r.mesh.listed().is_empty());
    let soon = r.at(109);
    assert!(!r.mesh.list_due(soon));
    let later = r.at(110);
    assert_eq!(r.mesh.next_deadline(), later);
    assert!(r.mesh.list_due(later));
    assert_eq!(r.mesh.listed().len(), 1);
}

#[test]
fn hostile_names_and_floods_are_refused() {
    let mut r = Registry::new();
    let now = r.at(0);
    let long = "x".repeat(NAME_MAX + 1);
    for name in ["", "a b", "a\nb", "\u{1b}[0m", "é", long.as_str()] {
        let sighting = Sighting {
            name: name.to_owned(),
            expires: Some(r.until(60)),
            deleted: false,
            incarnation: 1,
        };
        assert_eq!(r.mesh.seen(&sighting, now), Err(Refused::Name), "{name:?}");
    }
    for n in 0..MOST {
        assert!(r.shows(0, &format!("lb-{n}"), 60).is_some());
    }
    let sighting = Sighting {
        name: "one-more".to_owned(),
        expires: Some(r.until(60)),
        deleted: false,
        incarnation: 1,
    };
    assert_eq!(r.mesh.seen(&sighting, now), Err(Refused::TooMany));
}

fn replaced(name: &str) -> Option<MeshAction> {
    Some(MeshAction::Replaced(EndpointName::new(name)))
}

#[test]
fn another_process_under_the_name_is_news_once() {
    let mut registry = Registry::new();
    assert_eq!(registry.shows(0, "a", 60), connect("a"));
    let (late, soon) = (registry.until(80), registry.until(61));
    assert_eq!(registry.seen_as(1, "a", soon, 2), replaced("a"));
    assert_eq!(registry.seen_as(2, "a", soon, 2), None, "told already");
    assert_eq!(registry.seen_as(3, "a", late, 2), None, "renewed");
    // From a list that was made before.
    assert_eq!(registry.seen_as(4, "a", soon, 1), None);
    assert_eq!(registry.seen_as(5, "a", late, 3), replaced("a"));
    assert_eq!(registry.deletes(6, "a"), disconnect("a", Gone::Deleted));
}

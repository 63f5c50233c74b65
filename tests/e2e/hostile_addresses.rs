//! IPAM's addresses that do not fit: whoever asked is told, and nobody else
//! notices.

use meridio_lab::ipam::Call;
use meridio_lab::topology::{LIMIT, Topology};
use meridio_proxy::core::family::Family;
use meridio_proxy::proto::ipam::{Child, IPFamily};
use meridio_proxy::sync::clock;
use meridio_proxy::sync::thread::{STACK_SMALL, Threads};

use super::hostile::{Hostile, assert_held, held, lines, says};
use super::{during, in_good_order, lab, lost, steady};

/// An answer, to whom, and a word of what is said of it. The bridge has
/// 172.16.0.1/24 and fd00::1/64.
#[derive(Debug)]
struct Misfit {
    family: Family,
    /// `-src`, `-dst`, or both.
    ends: &'static str,
    address: &'static str,
    length: i32,
    word: &'static str,
}

const fn misfit(
    family: Family,
    ends: &'static str,
    (address, length): (&'static str, i32),
    word: &'static str,
) -> Misfit {
    Misfit {
        family,
        ends,
        address,
        length,
        word,
    }
}

const NO_ADDRESS: &str = "no such address";
const OUTSIDE: &str = "not in the subnet";
const NO_HOST: &str = "no host's address";

#[rustfmt::skip]
const MISFITS: [Misfit; 20] = [
    misfit(Family::V4, "-src", ("fd00::9", 64), NO_ADDRESS),
    misfit(Family::V6, "-dst", ("172.16.0.9", 24), NO_ADDRESS),
    misfit(Family::V6, "-src", ("::ffff:172.16.0.9", 64), OUTSIDE),
    misfit(Family::V4, "-src", ("172.16.0.9", 200), NO_ADDRESS),
    misfit(Family::V4, "-dst", ("172.16.0.9", -24), NO_ADDRESS),
    misfit(Family::V6, "-dst", ("fd00::9", i32::MAX), NO_ADDRESS),
    misfit(Family::V4, "-src", ("172.16.0.9", 0), OUTSIDE),
    misfit(Family::V4, "-src", ("172.16.0.9", 32), OUTSIDE),
    misfit(Family::V6, "-src", ("fd00::9", 128), OUTSIDE),
    misfit(Family::V4, "-dst", ("10.1.2.3", 24), OUTSIDE),
    misfit(Family::V6, "-src", ("fe00::7", 64), OUTSIDE),
    misfit(Family::V4, "-src", ("", 24), NO_ADDRESS),
    misfit(Family::V6, "-src", ("rubbish", 64), NO_ADDRESS),
    misfit(Family::V4, "-srcdst", ("172.16.0.9", 24), "the same"),
    misfit(Family::V6, "-srcdst", ("fd00::9", 64), "the same"),
    misfit(Family::V4, "-src", ("172.16.0.0", 24), NO_HOST),
    misfit(Family::V4, "-dst", ("172.16.0.255", 24), NO_HOST),
    misfit(Family::V6, "-dst", ("fd00::", 64), NO_HOST),
    misfit(Family::V4, "-src", ("172.16.0.1", 24), "the bridge's own"),
    misfit(Family::V6, "-dst", ("fd00::1", 64), "the bridge's own"),
];

impl Misfit {
    /// The answer to the Allocate of a child that has `owner` in its name.
    fn answer(&self, owner: &str, child: &Child) -> Option<(String, i32)> {
        let family = match self.family {
            Family::V4 => IPFamily::IPV4,
            Family::V6 => IPFamily::IPV6,
        };
        let (id, end) = child.name.rsplit_once('-')?;
        let is_meant = child.subnet.ipFamily == family.into() && self.ends.contains(end);
        (is_meant && id.contains(owner)).then(|| (self.address.to_owned(), self.length))
    }

    fn tell(&'static self, lab: &Topology, owner: &str) {
        let owner = owner.to_owned();
        (lab.ipam).set_answers(move |child| self.answer(&owner, child));
    }
}

#[test]
fn addresses_for_a_target_that_do_not_fit_are_not_used() {
    let mut lab = lab(2, 1);
    let traffic = steady(&lab);
    let before = held(&lab);
    let step = during(&traffic, || {
        for misfit in &MISFITS {
            // A new one each: what is known of a lease is used when IPAM fails.
            let name = lab.make_target().unwrap();
            // Nobody else asks meanwhile.
            misfit.tell(&lab, "");
            let answered = lab.targets[&name].connect();
            let error = answered.expect_err(&format!("{misfit:?}"));
            let (address, word) = (misfit.address, misfit.word);
            assert!(
                ["IPAM", address, word].iter().all(|w| error.contains(w)),
                "{word}: {error}"
            );
            lab.ipam.set_answer(None);
            lab.start_target(&name).unwrap();
            lab.stop_target(&name).unwrap();
            lab.targets.remove(&name);
        }
    });
    assert_eq!(step.lost_steady, 0, "{step}");
    assert_held(&lab, &before);
    in_good_order(&lab);
}

#[test]
fn addresses_for_an_lb_that_do_not_fit_are_not_used() {
    let mut lab = lab(2, 1);
    let traffic = steady(&lab);
    let step = during(&traffic, || {
        for (number, misfit) in MISFITS.iter().enumerate() {
            let since = lines(&lab);
            let name = format!("lb-misfit-{number}");
            misfit.tell(&lab, &name);
            (lab.nsmgr).add_endpoint(&lab.lb_service(), Hostile::endpoint(&name, "nse"));
            let words = ["no addresses from IPAM", misfit.address, misfit.word, &name];
            says(&lab, since, &words);
            lab.nsmgr.remove_endpoint(&name);
        }
        let daemon = lab.daemon().unwrap();
        daemon.health("Readiness").unwrap();
    });
    assert_eq!(lost(&lab, &step), 0, "{step}");
    // It is asked again, and what fits then is used.
    MISFITS[0].tell(&lab, "lb-3");
    let ipam = lab.ipam.clone();
    let heal = move |_| {
        let deadline = clock::now() + LIMIT;
        let of_it = |call: &&Call| call.child.name.contains("lb-3") && call.executed.is_some();
        let asked = ipam.wait(deadline, |_, calls| calls.iter().filter(of_it).count() >= 4);
        ipam.set_answer(None);
        asked.unwrap();
    };
    let _healer = (Threads::unsupervised().spawn("heal", STACK_SMALL, heal)).unwrap();
    let since = lines(&lab);
    lab.add_lb().unwrap();
    says(&lab, since, &["no addresses from IPAM", NO_ADDRESS]);
    in_good_order(&lab);
}

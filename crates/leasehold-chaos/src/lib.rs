//! Real servers, proxies and faults for the tests of Leasehold.
